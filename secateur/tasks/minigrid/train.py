"""Cloning the expert: the policy learns to say its next three actions."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur.tasks.minigrid.models import WIDTH, build, pixels
from secateur.tasks.minigrid.rooms import (
    AGENT,
    AHEAD,
    CELLS,
    EMPTY,
    FIRST,
    NAMED,
    PROMPT,
    THING,
    TILES,
    Frames,
    record,
    renamed,
)
from secateur.training import fit
from secateur.training import recipe as training
from secateur.training.fit import Hook

READ = (1, 2)
"""The layers after which the thing's word, and the last word, tell where the thing lies; in training only."""


@dataclass(frozen=True)
class Recipe:
    """What is trained and for how long."""

    seed: int = field(default=0, metadata={"help": "of the weights and of the rooms"})
    frames: int = field(default=8000, metadata={"help": "moments of the expert's episodes"})
    steps: int = field(default=1500, metadata={"help": "steps of training"})
    batch: int = field(default=64, metadata={"help": "moments in a step"})
    lr: float = field(default=2e-3, metadata={"help": "highest learning rate"})
    ahead: float = field(default=0.3, metadata={"help": "weight of the second and third action"})
    places: float = field(default=0.5, metadata={"help": "weight of what states are asked for"})
    drop: float = field(
        default=0.5, metadata={"help": "share of the steps in which visual tokens are missing"}
    )


class Learner(nn.Module):
    """The policy, and what its states are asked for in training only."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.policy = build(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.tile, self.place = nn.Linear(WIDTH, TILES), nn.Linear(WIDTH, CELLS)
            self.goal = nn.Linear(WIDTH, CELLS + 1)

    def forward(self, frames: Frames, kept: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B, 3, words] of the actions, the expert's earlier ones given, and the loss of what states are asked for.

        kept [B, n]: the cells that are seen, in ascending order.
        """
        inner, layers = self.policy.model, self.policy.model.language_model.layers
        embeddings = inner.get_input_embeddings()
        seen = inner.vision_tower(pixels(frames.cells), output_hidden_states=True).hidden_states[-1][:, 1:]
        seen = inner.multi_modal_projector(seen)
        asked = self.seen(seen, embeddings.weight, frames.cells.long())
        said = frames.actions[:, : AHEAD - 1].clamp(min=0) + FIRST
        words = embeddings(torch.cat([frames.words, said], 1))
        x = torch.cat([seen.gather(1, kept[..., None].expand(-1, -1, WIDTH)), words], 1)
        behind = torch.arange(CELLS, CELLS + words.shape[1], device=x.device).expand(len(x), -1)
        mask = torch.full([x.shape[1]] * 2, -1e9, device=x.device).triu(1)
        tables = inner.language_model.rotary_emb(x, torch.cat([kept, behind], 1))
        for number, layer in enumerate(layers, 1):
            x = layer(x, attention_mask=mask, position_embeddings=tables)
            if number in READ:
                asked = asked + self.where(x[:, kept.shape[1] + PROMPT - 2 + READ.index(number)], frames.goal)
        return self.policy.lm_head(inner.language_model.norm(x[:, -AHEAD:])), asked

    def seen(self, features: Tensor, embeddings: Tensor, cells: Tensor) -> Tensor:
        """Of the visual tokens [B, 49, 80]: what tile each is, where it lies, and which word names it."""
        places = torch.arange(CELLS, device=cells.device).expand_as(cells)
        losses = F.cross_entropy(self.tile(features).flatten(0, 1), cells.flatten())
        losses = losses + F.cross_entropy(self.place(features).flatten(0, 1), places.flatten())
        thing = (cells >= THING) & (cells < AGENT)
        words = F.normalize(embeddings[NAMED:FIRST], dim=1)
        alike = 10 * F.normalize(features[thing], dim=1) @ words.T
        return losses + F.cross_entropy(alike, cells[thing] - THING)

    def where(self, states: Tensor, goal: Tensor) -> Tensor:
        """Of a word [B, 80]: the cells of the thing [B, 49], or that it isn't seen."""
        wanted = torch.cat([goal, ~goal.any(1, keepdim=True)], 1).float()
        return F.cross_entropy(self.goal(states), wanted / wanted.sum(1, keepdim=True))


def stay(frames: Frames, share: float, generator: torch.Generator) -> Tensor:
    """int64 [B, n] the cells that are seen, ascending: all of them, or in a `share` of the draws some.

    n is drawn between a tenth of the cells and all; those of the thing that is named stay.
    """

    def draws(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator)

    few = draws(1).item() < share
    count = round(CELLS * (0.1 + 0.9 * draws(1).item())) if few else CELLS
    # half of the pictures keep things rather than floor
    liking = (
        draws(len(frames), CELLS) + ((frames.cells > EMPTY) & (draws(len(frames), 1) < 0.5)) + 2 * frames.goal
    )
    return liking.topk(count, 1).indices.sort(1).values


def train_policy(
    recipe: Recipe,
    work: str | Path | None = None,
    every: int = 100,
    resume: bool = True,
    after_step: Sequence[Hook] = (),
) -> tuple[nn.Module, dict[str, Any]]:
    """Records the expert and clones it; gives the policy in eval mode and what is known of it (recipe, cost, losses).

    >>> policy, about = train_policy(Recipe(frames=2000, steps=20))  # doctest: +SKIP

    work: a folder for a checkpoint, written every `every` steps; a run that finds one goes on there if `resume`.

    Raises `SecateurError`: minigrid isn't installed, a loss that isn't finite, a checkpoint of another recipe.
    """
    begun, cpu = time.monotonic(), time.process_time()
    frames = record(recipe.frames, recipe.seed)
    learner = Learner(recipe.seed)

    def augment(batch: tuple[Tensor, ...], generator: torch.Generator) -> tuple[Tensor, ...]:
        moved = renamed(Frames(*batch), generator)
        return (*moved, stay(moved, recipe.drop, generator))

    def loss(learner: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        *moments, kept = batch
        frames = Frames(*moments)
        logits, asked = learner(frames, kept)
        answers = torch.where(frames.actions >= 0, frames.actions + FIRST, -100)
        first, *later = (F.cross_entropy(logits[:, step], answers[:, step]) for step in range(AHEAD))
        return first + recipe.ahead * sum(later) + recipe.places * asked

    file = Path(work) / "checkpoint.safetensors" if work else None
    if file and not resume:
        file.unlink(missing_ok=True)
    losses = fit(
        learner,
        tuple(frames),
        steps=recipe.steps,
        loss=loss,
        augment=augment,
        after_step=after_step,
        seed=recipe.seed,
        recipe=training.Recipe(
            lr=recipe.lr, batch=recipe.batch, betas=(0.9, 0.98), weight_decay=0.02, warmup=0.05
        ),
        checkpoint=file,
        every=every,
        about={"recipe": dataclasses.asdict(recipe)},
        description="cloning the expert",
    )
    return learner.policy.eval(), {
        "recipe": dataclasses.asdict(recipe),
        "steps": recipe.steps,
        "loss": [round(value, 3) for value in losses[:: max(1, recipe.steps // 20)]],
        "seconds": round(time.monotonic() - begun, 1),
        "processor_seconds": round(time.process_time() - cpu, 1),
    }
