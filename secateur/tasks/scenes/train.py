"""The recipe that trains a small vision-language model on `scenes`, on one processor or one accelerator.

Stages. See: the tower learns what is on each patch, and the CLS token what is in the picture. Align: the projector
learns to put that into word embeddings. Read: the language model learns to answer, the tower frozen. Joint: everything.
Polish: the same once more, from a rate that has risen again.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from secateur.errors import SecateurError, require
from secateur.tasks.scenes import draw as scenes
from secateur.tasks.scenes.draw import (
    CELLS,
    COLOURS,
    EOS,
    GRID,
    KINDS,
    LONGEST,
    PLACES,
    PLURALS,
    SHAPES,
    Questions,
)
from secateur.tasks.scenes.models import (
    TOKENS,
    WIDTH,
    build,
    eye_block,
    frame,
    load_scenes,
    pixels,
    project,
    projector_of,
    see,
    tower_of,
    variant_of,
)
from secateur.utils.files import atomic_write_bytes
from secateur.utils.progress import bar
from secateur.utils.screen import Screen

SIDES = ("left", "right", "above", "below")
STAGES = ("see", "align", "read", "joint", "polish")
CHUNK = 8  # batches of data drawn at a time
LOG_EVERY = 100
WORTH_COMPILING = 500  # steps
LICENCE = "Apache-2.0; trained from nothing on pictures drawn by this program"


@dataclass(frozen=True)
class Recipe:
    """What a training run depends on.

    start: a folder that `train scenes` wrote, whose weights the run goes on from. words: the rate of the word embeddings, in
    rates of the language model's other weights.
    """

    variant: str = "llava"
    seed: int = 0
    batch: int = 32
    see: int = 600
    align: int = 250
    read: int = 1800
    joint: int = 1500
    polish: int = 0
    see_lr: float = 1.5e-3
    read_lr: float = 1.5e-3
    joint_lr: float = 5e-4
    polish_lr: float = 4e-4
    tower_lr: float = 2e-4
    slots: tuple[str, ...] = (
        "presence",
        "presence",
        "colour",
        "count",
        "count",
        "relation",
        "relation",
        "where",
    )
    drop: float = 0.5
    least: float = 0.08
    bias: float = 0.5
    compact: float = 0.3
    bind: float = 0.3
    point: float = 0.3
    compare: float = 0.3
    side: float = 0.0
    words: float = 1.0
    point_layer: int = 2
    compare_layer: int = 3
    decay: float = 0.01
    start: str = ""

    def steps(self, stage: str) -> int:
        return getattr(self, stage)


def pack(
    asked: list[Questions], kinds: tuple[str, ...], kept: Tensor, compact: Tensor, variant: str
) -> dict[str, Any]:
    """One sequence a picture: its visual tokens, then the questions, which see the picture but not one another.

    kept: bool [B, 64], the visual tokens that are seen. compact: bool [B], whether positions close up over those that
    are not. Gives ids, mask (bool [B, 1, L, L]), positions, and labels; the same numbers as one question at a time.
    """
    count, device = len(kept), kept.device
    before, after = frame(variant)
    prefix = len(before) + TOKENS + len(after)
    base, steps, padding = _layout(kinds, prefix, device)
    start = torch.tensor([*before, *[0] * TOKENS, *after], device=device).expand(count, prefix)
    pieces, labels = [start], [torch.full_like(start, -100)]
    points, sides = [torch.full_like(start, -1)], [torch.full_like(start, -1)]
    wide = [start]
    for question, kind in zip(asked, kinds):
        width = LONGEST[kind] + 1
        words = F.pad(question.words, (0, width - question.words.shape[1]))
        pieces.append(words.scatter(1, question.length[:, None], question.answer[:, None]))
        wide.append(words)
        label = torch.full_like(words, -100)
        label = label.scatter(
            1, question.length[:, None] - 1, question.answer.where(question.asked, -100)[:, None]
        )
        end = torch.full_like(question.answer, EOS).where(question.asked, -100)
        labels.append(label.scatter(1, question.length[:, None], end[:, None]))
        point = torch.full_like(words, -1)
        for which in (0, 1):
            known = question.asked & (question.at[:, which] >= 0)
            place = question.at[:, which].clamp(min=0)[:, None]
            point = torch.where(
                known[:, None] & (torch.arange(width, device=device) == place),
                question.about[:, which, None],
                point,
            )
        points.append(point)
        two = (question.about >= 0).all(1) & question.asked
        row, column = (
            (part[:, 0] - part[:, 1]).sign() + 1 for part in (question.about // CELLS, question.about % CELLS)
        )
        last = torch.arange(width, device=device) == question.at[:, 1:]
        sides.append(torch.where(two[:, None] & last, (row * 3 + column)[:, None], -1))
    seen = F.pad(kept, (len(before), len(base) - len(before) - TOKENS), value=True)
    ids = F.pad(torch.cat(pieces, 1), (0, padding))
    mask = base & seen[:, None] | torch.eye(len(base), dtype=torch.bool, device=device)
    return {
        "ids": ids,
        "mask": mask[:, None],
        "positions": _positions(kept, compact, steps, variant),
        "labels": F.pad(torch.cat(labels, 1), (0, padding), value=-100),
        "point": F.pad(torch.cat(points, 1), (0, padding), value=-1),
        "bind": _named(ids),
        "compare": F.pad(torch.cat(sides, 1), (0, padding), value=-1),
        "side": F.pad(torch.cat([_side(question) for question in wide], 1), (0, padding), value=-1),
    }


def _side(words: Tensor) -> Tensor:
    """At the "?" of a question of a relation: which of `SIDES` it asks for; -1 elsewhere."""
    named = (words[..., None] == _constant(SIDES, words.device)).any(1)
    asks = (words == scenes.ID["?"]) & named.any(1, keepdim=True)
    return named.long().argmax(1, keepdim=True).expand_as(words).where(asks, -1)


def _named(ids: Tensor) -> Tensor:
    """Of each shape's word that follows a colour's: the kind (colour * 4 + shape) that both name; -1 elsewhere."""
    colour, shape = (
        (ids[..., None] == _constant(names, ids.device)).long() for names in (tuple(COLOURS), SHAPES)
    )
    before = F.pad(colour, (0, 0, 1, 0))[:, :-1]
    kind = before.argmax(-1) * len(SHAPES) + shape.argmax(-1)
    return kind.where((before.sum(-1) > 0) & (shape.sum(-1) > 0), -1)


@functools.lru_cache
def _layout(kinds: tuple[str, ...], prefix: int, device: torch.device) -> tuple[Tensor, Tensor, int]:
    """Who sees whom [L, L], the step of each token within its question, and the padding to a multiple of eight."""
    widths = [LONGEST[kind] + 1 for kind in kinds]
    padding = -(prefix + sum(widths)) % 8
    part = [0] * prefix + [n + 1 for n, width in enumerate(widths) for _ in range(width)] + [-1] * padding
    steps = [step for width in widths for step in range(width)] + [0] * padding
    parts = torch.tensor(part, device=device)
    causal = torch.ones(len(part), len(part), dtype=torch.bool, device=device).tril()
    return ((parts[:, None] == parts) | (parts == 0)) & causal, torch.tensor(steps, device=device), padding


@functools.lru_cache
def _constant(names: tuple[str, ...], device: torch.device) -> Tensor:
    return torch.tensor([scenes.ID[name] for name in names], device=device)


def _positions(kept: Tensor, compact: Tensor, steps: Tensor, variant: str) -> Tensor:
    """[B, L] for llava, [3, B, L] (time, row, column) for qwen: a picture's tokens share one time there."""
    before, after = (len(part) for part in frame(variant))
    count, device = len(kept), kept.device
    line = torch.arange(TOKENS, device=device).expand(count, TOKENS)
    closed = (kept.long().cumsum(1) - 1).clamp(min=0)
    left = kept.sum(1)
    if variant == "llava":
        planes, span = line[None], torch.full_like(left, TOKENS)
    else:
        planes = torch.stack([line * 0, line // GRID, line % GRID])
        span = torch.full_like(left, GRID)
    planes = torch.where(compact[:, None], closed, planes) + before
    span = torch.where(compact, left, span)[:, None]
    first = torch.arange(before, device=device).expand(count, before)
    behind = before + span + torch.arange(after, device=device)
    questions = before + span + after + steps
    found = torch.cat(
        [
            torch.cat([part.expand(count, -1) for part in (first, plane, behind, questions)], 1)[None]
            for plane in planes
        ]
    )
    return found[0] if variant == "llava" else found


@dataclass(repr=False)
class Batch(Screen):
    """Some pictures (uint8), the object on each patch, and a question a slot."""

    pictures: Tensor
    scenes: scenes.Scenes
    owner: Tensor
    asked: list[Questions]
    slots: tuple[str, ...]

    def part(self, rows: slice) -> Batch:
        """Some of the pictures, without their questions."""
        return Batch(self.pictures[rows], self.scenes[rows], self.owner[rows], [], self.slots)


def draw(count: int, slots: tuple[str, ...], generator: torch.Generator) -> Batch:
    """`count` scenes, rendered, with a question of each of the kinds in `slots`."""
    found = scenes.draw_scenes(count, generator)
    pictures, owner = scenes.render(found, generator)
    return Batch(pictures, found, owner, [scenes.ask(found, kind, generator) for kind in slots], slots)


def _rows(packed: dict[str, Tensor], rows: slice) -> dict[str, Tensor]:
    """Some of the pictures of `pack`; positions of three axes have them second."""
    return {
        name: value[:, rows] if name == "positions" and value.dim() == 3 else value[rows]
        for name, value in packed.items()
    }


def drop(batch: Batch, recipe: Recipe, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Which visual tokens are seen in training, bool [B, 64], and whose positions close up, bool [B].

    A share `drop` of the pictures lose tokens: all but a share drawn from `least`..1. In a share `bias` of those, tokens
    on objects are more likely to stay, so that the model also meets pictures without a background. Positions on a plane
    (qwen) never close up.
    """
    count, device = len(batch.pictures), batch.pictures.device

    def chance(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, device=device)

    share = torch.where(
        chance(count) < recipe.drop,
        recipe.least + (1 - recipe.least) * chance(count),
        torch.ones(count, device=device),
    )
    lift = chance(count) * (chance(count) < recipe.bias)
    score = chance(count, TOKENS) + lift[:, None] * (batch.owner >= 0)
    rank = score.argsort(1, descending=True).argsort(1)
    kept = rank < (share * TOKENS).round().clamp(min=1)[:, None]
    return kept, (chance(count) < recipe.compact) & (recipe.variant == "llava")


class Heads(nn.Module):
    """Linear read-outs that exist in training only."""

    def __init__(self, eye: int, pooled: bool) -> None:
        super().__init__()
        self.kind = nn.Linear(eye, 1 + len(COLOURS) * len(SHAPES))
        self.cell = nn.Linear(eye, CELLS**2)
        self.pooled = nn.Linear(eye, len(COLOURS) * len(SHAPES)) if pooled else None
        self.point = nn.Linear(WIDTH, CELLS**2 + 1)
        self.bind = nn.Linear(WIDTH, len(COLOURS) * len(SHAPES))
        self.compare = nn.Linear(WIDTH, 9)
        self.side = nn.Linear(WIDTH, len(SIDES))


def _of(owner: Tensor, values: Tensor) -> Tensor:
    """`values` [B, 6] of the object on each patch; object 0 where there is none."""
    return values.gather(1, owner.clamp(min=0))


def see_loss(hidden: Tensor, pooled: Tensor | None, batch: Batch, heads: Heads) -> Tensor:
    """What each patch shows and in which cell its object is; what is in the picture."""
    found = hidden.mean(2)
    kinds = (_of(batch.owner, batch.scenes.kind) + 1).where(batch.owner >= 0, 0)
    weight = torch.ones(heads.kind.out_features, device=found.device)
    weight[0] = 0.2
    logits = heads.kind(found).float()
    loss = F.cross_entropy(logits.flatten(0, 1), kinds.flatten(), weight=weight)
    cells = _of(batch.owner, batch.scenes.cell).where(batch.owner >= 0, -100)
    loss = loss + 0.5 * F.cross_entropy(
        heads.cell(found).float().flatten(0, 1), cells.flatten(), ignore_index=-100
    )
    if pooled is not None and heads.pooled is not None:
        there = torch.zeros(len(found), heads.pooled.out_features, device=found.device)
        there = there.scatter_add(1, batch.scenes.kind, batch.scenes.there.float()).clamp(max=1)
        loss = loss + F.binary_cross_entropy_with_logits(heads.pooled(pooled).float(), there)
    return loss


def align_loss(features: Tensor, batch: Batch, words: Tensor) -> Tensor:
    """Projected patches against the embeddings of their object's colour, shape, plural and cell (or their own cell)."""
    device = features.device

    def logits(names: Any) -> Tensor:
        chosen = F.normalize(words[_constant(tuple(names), device)].float(), dim=-1)
        return features.float() @ chosen.T * 3

    def match(names: Any, wanted: Tensor) -> Tensor:
        return F.cross_entropy(logits(names).flatten(0, 1), wanted.flatten(), ignore_index=-100)

    on = batch.owner >= 0
    colour = _of(batch.owner, batch.scenes.colour).where(on, -100)
    shape = _of(batch.owner, batch.scenes.shape).where(on, -100)
    place = torch.arange(GRID, device=device) * CELLS // GRID
    own = (place[:, None] * CELLS + place).flatten()
    cell = torch.where(on, _of(batch.owner, batch.scenes.cell), own)
    loss = (
        match(COLOURS, colour)
        + match(SHAPES, shape)
        + 0.5 * match(PLURALS, shape)
        + 0.5 * match(PLACES, cell)
    )
    for names in (COLOURS, SHAPES):
        loss = loss + 0.1 * ((logits(names).logsumexp(-1).clamp(min=2) - 2) * ~on).mean()
    return loss


class Trainer:
    """A run: the model, its heads, the stage and step it is at."""

    def __init__(
        self, recipe: Recipe, device: str | torch.device = "cpu", compiled: bool | None = None
    ) -> None:
        self.recipe = recipe
        self.device = torch.device(device)
        self.compiled = compiled
        self.before = load_scenes(recipe.start, recipe.seed) if recipe.start else None
        self.model = build(recipe.variant, recipe.seed).to(self.device)
        if self.before is not None:
            self._go_on_from(self.before)
        pooled = recipe.variant == "llava"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            eye = next(
                p
                for n, p in self.model.named_parameters()
                if n.endswith(("norm1.weight", "layer_norm1.weight"))
            ).shape[0]
            self.heads = Heads(eye, pooled).to(self.device)
        self.stage, self.step, self.spent, self.cpu = 0, 0, 0.0, 0.0
        self.optimizer: torch.optim.Optimizer | None = None
        self.chunk: tuple[int, int] | None = None
        self.caught: dict[str, Tensor] = {}
        self.tally: Tensor | None = None
        layers = self.model.model.language_model.layers
        for name, number in (
            ("bind", 1),
            ("point", recipe.point_layer),
            ("compare", recipe.compare_layer),
            ("side", recipe.point_layer),
        ):
            layers[number - 1].register_forward_hook(functools.partial(self._catch, name))
        self.log: list[dict[str, Any]] = []
        self.eye_block = eye_block
        if self.device.type == "cpu":
            self.model.set_attn_implementation("eager")
            total = sum(recipe.steps(stage) for stage in STAGES)
            if compiled if compiled is not None else total >= WORTH_COMPILING and shutil.which("g++"):
                for block in self._blocks():
                    block.forward = torch.compile(block.forward)
                self.eye_block = torch.compile(eye_block)

    def _go_on_from(self, before: nn.Module) -> None:
        if variant_of(before) != self.recipe.variant:
            raise SecateurError(
                f"it is a {variant_of(before)}, and a {self.recipe.variant} is trained",
                where=f"start {self.recipe.start}",
                fix=f"--variant {variant_of(before)}",
            )
        self.model.load_state_dict(before.state_dict())

    def _blocks(self) -> list[nn.Module]:
        inner = self.model.model
        eye = inner.vision_tower.encoder.layers if self.recipe.variant == "llava" else []
        return [*inner.language_model.layers, *eye]

    def _catch(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        self.caught[name] = output[0] if isinstance(output, tuple) else output

    def groups(self) -> list[dict[str, Any]]:
        recipe, model = self.recipe, self.model
        stage = STAGES[self.stage]
        words = model.get_input_embeddings().weight
        text = [p for p in model.model.language_model.parameters() if p is not words]
        heads = list(self.heads.parameters())
        if stage == "see":
            return [{"params": tower_of(model) + heads, "lr": recipe.see_lr}]
        if stage == "align":
            return [{"params": projector_of(model), "lr": recipe.see_lr}]
        rate = {"read": recipe.read_lr, "joint": recipe.joint_lr, "polish": recipe.polish_lr}[stage]
        found = [
            {"params": projector_of(model) + text + heads, "lr": rate},
            {"params": [words], "lr": rate * recipe.words},
        ]
        return found if stage == "read" else [*found, {"params": tower_of(model), "lr": recipe.tower_lr}]

    def begin(self) -> None:
        """Freezes what the stage does not train, and starts its optimizer."""
        groups = self.groups()
        for parameter in [*self.model.parameters(), *self.heads.parameters()]:
            parameter.requires_grad_(False)
            parameter.grad = None
        for group in groups:
            for parameter in group["params"]:
                parameter.requires_grad_(True)
        self.rates = [group["lr"] for group in groups]
        self.optimizer = torch.optim.AdamW(
            groups, betas=(0.9, 0.98), weight_decay=self.recipe.decay, fused=self.device.type == "cuda"
        )

    def batch(self) -> tuple[Batch, slice]:
        """The batch of this step; chunks of eight are drawn together, seeded by run, stage and number."""
        number, within = divmod(self.step, CHUNK)
        if self.chunk != (self.stage, number):
            generator = torch.Generator(self.device)
            key = f"{self.recipe.seed}/{self.stage}/{number}".encode()
            generator.manual_seed(int.from_bytes(hashlib.sha256(key).digest()[:7], "big"))
            slots = self.recipe.slots if self.stage >= 2 else ()
            self.drawn = draw(CHUNK * self.recipe.batch, slots, generator)
            if slots:
                self.kept, compact = drop(self.drawn, self.recipe, generator)
                self.packed = pack(self.drawn.asked, slots, self.kept, compact, self.recipe.variant)
            self.chunk = (self.stage, number)
        rows = slice(within * self.recipe.batch, (within + 1) * self.recipe.batch)
        return self.drawn.part(rows), rows

    def loss(self) -> Tensor:
        stage, recipe, model = STAGES[self.stage], self.recipe, self.model
        batch, rows = self.batch()
        words = model.get_input_embeddings().weight
        with torch.autocast(self.device.type, torch.bfloat16):
            with torch.set_grad_enabled(stage in ("see", "joint", "polish")):
                hidden, pooled = see(model, pixels(batch.pictures, recipe.variant), self.eye_block)
            if stage == "see":
                return see_loss(hidden, pooled, batch, self.heads)
            features = project(model, hidden)
            if stage == "align":
                return align_loss(features, batch, words)
            loss, right, asked = self.answer(_rows(self.packed, rows), batch.slots, features)
            self.count(batch.slots, right, asked, self.kept[rows])
            loss = loss + 0.05 * align_loss(features, batch, words)
            if stage in ("joint", "polish"):
                loss = loss + 0.2 * see_loss(hidden, pooled, batch, self.heads)
        return loss

    def answer(
        self, packed: dict[str, Tensor], slots: tuple[str, ...], features: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The loss, and for each picture and slot whether the answer is right and whether there was a question."""
        model, recipe = self.model, self.recipe
        words = model.get_input_embeddings()
        embedded = words(packed["ids"]).to(features.dtype)
        start = len(frame(recipe.variant)[0])
        embedded = torch.cat([embedded[:, :start], features, embedded[:, start + TOKENS :]], 1)
        mask = packed["mask"].to(features.dtype).sub(1).mul(1e4)
        hidden = model.model.language_model(
            inputs_embeds=embedded,
            attention_mask=mask,
            position_ids=packed["positions"],
            use_cache=False,
        ).last_hidden_state[:, start + TOKENS :]
        labels = packed["labels"][:, start + TOKENS :]
        logits = (hidden @ words.weight.T.to(hidden.dtype)).float()
        losses = F.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), reduction="none", ignore_index=-100
        ).view(labels.shape)
        ends, answers = labels == EOS, (labels != EOS) & (labels >= 0)
        loss = (losses * answers).sum() / answers.sum()
        loss = loss + 0.1 * (losses * ends).sum() / ends.sum()
        for name, weight, head in (
            ("point", recipe.point, self.heads.point),
            ("bind", recipe.bind, self.heads.bind),
            ("compare", recipe.compare, self.heads.compare),
            ("side", recipe.side, self.heads.side),
        ):
            if not weight:
                continue
            told = head(self.caught[name][:, start + TOKENS :]).float()
            wanted = packed[name][:, start + TOKENS :]
            losses = F.cross_entropy(told.flatten(0, 1), wanted.flatten(), ignore_index=-1, reduction="sum")
            loss = loss + weight * losses / (wanted >= 0).sum().clamp(min=1)
        hit = (logits.argmax(-1) == labels) & answers
        right, asked, at = [], [], len(frame(recipe.variant)[1])
        for kind in slots:
            width = LONGEST[kind] + 1
            right.append(hit[:, at : at + width].any(1))
            asked.append(answers[:, at : at + width].any(1))
            at += width
        return loss, torch.stack(right, 1), torch.stack(asked, 1)

    def count(self, slots: tuple[str, ...], right: Tensor, asked: Tensor, kept: Tensor) -> None:
        if self.tally is None:
            self.tally = torch.zeros(2, 2, len(KINDS), device=self.device)
        order = torch.tensor([KINDS.index(kind) for kind in slots], device=self.device)
        dense = kept.all(1)[:, None]
        for row, rows in enumerate((dense, ~dense)):
            self.tally[row, 0].index_add_(0, order, (right & rows).sum(0).float())
            self.tally[row, 1].index_add_(0, order, (asked & rows).sum(0).float())

    def run(self, checkpoint: Path | None = None, every: int = 500, stop: int | None = None) -> None:
        """Trains to the end, or for `stop` steps."""
        total = sum(self.recipe.steps(stage) for stage in STAGES)
        done = sum(self.recipe.steps(stage) for stage in STAGES[: self.stage]) + self.step
        self.model.train()
        with bar(f"scenes {self.recipe.variant} {self.recipe.seed}", total) as advance:
            advance(done)
            while self.stage < len(STAGES):
                steps = self.recipe.steps(STAGES[self.stage])
                if self.optimizer is None:
                    self.begin()
                self.tally = None
                begun, cpu, summed = (
                    time.monotonic(),
                    time.process_time(),
                    torch.zeros((), device=self.device),
                )
                while self.step < steps:
                    scale = min(1, (self.step + 1) / min(100, steps)) * (
                        0.02 + 0.98 * (0.5 + 0.5 * math.cos(math.pi * self.step / steps))
                    )
                    for group, rate in zip(self.optimizer.param_groups, self.rates):  # type: ignore[union-attr]
                        group["lr"] = rate * scale
                    loss = self.loss()
                    self.optimizer.zero_grad()  # type: ignore[union-attr]
                    loss.backward()
                    trained = [p for group in self.optimizer.param_groups for p in group["params"]]  # type: ignore[union-attr]
                    torch.nn.utils.clip_grad_norm_(trained, 1.0)
                    self.optimizer.step()  # type: ignore[union-attr]
                    summed += loss.detach()
                    self.step += 1
                    advance(1)
                    if self.step % LOG_EVERY == 0 or self.step == steps:
                        self.note(summed, begun, cpu)
                        begun, cpu = time.monotonic(), time.process_time()
                        summed = torch.zeros((), device=self.device)
                    if stop is not None:
                        stop -= 1
                    if checkpoint and (self.step % every == 0 or stop == 0):
                        self.save(checkpoint)
                    if stop == 0:
                        return
                self.stage, self.step, self.optimizer = self.stage + 1, 0, None
        with torch.no_grad():
            self.model.get_output_embeddings().weight.copy_(self.model.get_input_embeddings().weight)
        for block in self._blocks():
            block.__dict__.pop("forward", None)
        self.model.set_attn_implementation("sdpa")
        self.model.eval()

    def note(self, summed: Tensor, begun: float, cpu: float) -> None:
        """One line of the log: the mean loss and the answers that were right since the last line."""
        value = summed.item() / (self.step % LOG_EVERY or LOG_EVERY)
        if not math.isfinite(value):
            raise SecateurError(
                f"the loss is {value}", where=f"{STAGES[self.stage]} step {self.step}", fix="lower lr"
            )
        self.spent += time.monotonic() - begun
        self.cpu += time.process_time() - cpu
        line: dict[str, Any] = {
            "stage": STAGES[self.stage],
            "step": self.step,
            "loss": round(value, 4),
            "seconds": round(self.spent, 1),
            "cpu": round(self.cpu, 1),
        }
        if self.tally is not None:
            right = (self.tally[:, 0] / self.tally[:, 1].clamp(min=1) * 100).round(decimals=1).tolist()
            line |= {"all": right[0], "dropped": right[1]}
            self.tally = None
        self.log.append(line)

    def about(self) -> dict[str, Any]:
        """What is written beside the weights."""
        known = {} if self.before is None else self.before.scenes
        before = {
            k: known[k] for k in ("recipe", "steps", "processor_seconds", "accuracy", "before") if k in known
        }
        return {
            "recipe": dataclasses.asdict(self.recipe),
            **({"before": before} if before else {}),
            "device": self.device.type,
            "steps": sum(self.recipe.steps(stage) for stage in STAGES),
            "seconds": round(self.spent, 1),
            "processor_seconds": round(self.cpu, 1),
            "licence": LICENCE,
            "log": self.log,
        }

    def settings(self) -> str:
        return json.dumps(dataclasses.asdict(self.recipe), sort_keys=True)

    def save(self, path: Path) -> None:
        tensors = {f"model/{k}": v for k, v in self.model.state_dict().items()}
        tensors |= {f"heads/{k}": v for k, v in self.heads.state_dict().items()}
        state = self.optimizer.state_dict()["state"] if self.optimizer else {}
        for index, parts in state.items():
            tensors |= {f"optimizer/{index}/{k}": torch.as_tensor(v) for k, v in parts.items()}
        about = {
            "stage": self.stage,
            "step": self.step,
            "spent": self.spent,
            "cpu": self.cpu,
            "log": self.log,
        }
        metadata = {"recipe": self.settings(), "state": json.dumps(about)}
        clean = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
        atomic_write_bytes(path, save(clean, metadata))

    def load(self, path: Path) -> None:
        """Goes on from a file that `save` wrote. Raises SecateurError where it is damaged or of another recipe."""
        try:
            with safe_open(str(path), "pt", device=str(self.device)) as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                about = json.loads(metadata["state"])
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise SecateurError(
                f"it isn't a checkpoint ({error})", where=str(path), fix="remove it"
            ) from error
        if metadata.get("recipe") != self.settings():
            raise SecateurError(
                "it belongs to another recipe", where=str(path), fix="remove it to start anew"
            )

        def under(prefix: str) -> dict[str, Tensor]:
            return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

        self.model.load_state_dict(under("model/"))
        self.heads.load_state_dict(under("heads/"))
        self.stage, self.step = about["stage"], about["step"]
        self.spent, self.cpu, self.log = about["spent"], about["cpu"], about["log"]
        self.begin()
        moments: dict[int, dict[str, Tensor]] = {}
        for name, value in under("optimizer/").items():
            index, key = name.split("/")
            moments.setdefault(int(index), {})[key] = value
        groups = self.optimizer.state_dict()["param_groups"]  # type: ignore[union-attr]
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})  # type: ignore[union-attr]


@torch.no_grad()
def packed_accuracy(
    trainer: Trainer, images: int = 512, keep: float = 1.0, seed: int = 1_000_003
) -> dict[str, float]:
    """Accuracy by kind, percent, with all questions of a picture in one sequence and random tokens kept."""
    generator = torch.Generator(trainer.device).manual_seed(seed)
    batch = draw(images, KINDS, generator)
    right, asked = [], []
    trainer.model.eval()
    rank = torch.rand(images, TOKENS, generator=generator, device=trainer.device).argsort(1).argsort(1)
    kept = rank < round(keep * TOKENS)
    packed = pack(batch.asked, KINDS, kept, kept[:, 0] & False, trainer.recipe.variant)
    for start in range(0, images, 128):
        rows = slice(start, start + 128)
        with torch.autocast(trainer.device.type, torch.bfloat16):
            values = pixels(batch.pictures[rows], trainer.recipe.variant)
            features = project(trainer.model, see(trainer.model, values)[0])
            _, hit, had = trainer.answer(_rows(packed, rows), KINDS, features)
        right.append(hit)
        asked.append(had)
    shares = torch.cat(right).sum(0) / torch.cat(asked).sum(0) * 100
    return {kind: round(share, 1) for kind, share in zip(KINDS, shares.tolist())}


def train_scenes(
    recipe: Recipe,
    device: str | torch.device = "cpu",
    work: str | Path | None = None,
    every: int = 500,
    resume: bool = True,
) -> tuple[nn.Module, dict[str, Any]]:
    """Runs the recipe; gives the model in eval mode and what is known of it (recipe, cost, log).

    >>> model, about = train_scenes(Recipe(variant="llava", seed=0), device="cuda")  # doctest: +SKIP

    work: a folder for a checkpoint, written every `every` steps; a run that finds one goes on there if `resume`. Raises
    `SecateurError` for a kind of question that there is not, a rate that isn't above 0, a loss that isn't finite, a checkpoint of another recipe.
    """
    for slot in recipe.slots:
        if slot not in KINDS:
            raise SecateurError(
                f"no question is of kind {slot!r}", where="slots", fix=f"some of {', '.join(KINDS)}"
            )
    for name in ("see_lr", "read_lr", "joint_lr", "polish_lr", "tower_lr", "words"):
        rate = getattr(recipe, name)
        require(
            rate > 0,
            f"{name} is {rate}, and a rate is above 0",
            where="train scenes",
            fix=f"leave {name} out",
        )
    trainer = Trainer(recipe, device)
    file = Path(work) / "checkpoint.safetensors" if work else None
    if file and file.exists() and resume:
        trainer.load(file)
    trainer.run(file, every)
    return trainer.model, trainer.about()
