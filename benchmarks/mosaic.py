"""One small object in a large picture: what `lrs-dip` finds with a few tiles, beside the base view, random tiles and all tiles.

    python benchmarks/mosaic.py [--sides 8,16] [--seeds 0,1,2] [--limit 64] [--every 16] [--work DIR] [--out FILE]
    python benchmarks/mosaic.py --time 9 [--sides 8,16]    # processor time of a question, and its ratio, alone

The shipped `scenes:llava` models read pictures of 64 pixels. The layers that look are trained here, on mosaics, to attend to the
tile of the object that is asked about (`--work` keeps them); the models stay as they are. "one zoom": from the base view to the finest
tiles; "two zooms": by way of a level of half their scale. Cost is in multiply-adds of tower, look and language model for a
question, and in processor seconds, without those of cutting a picture into tiles.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rows import spread
from safetensors.torch import save_file
from torch import Tensor

from secateur.tasks.scenes.draw import BOS, IMAGE, SIZE
from secateur.tasks.scenes.evaluate import deviation
from secateur.tasks.scenes.models import TOKENS, load_scenes, pixels, project, see
from secateur.tasks.scenes.mosaic import EMPTY, Mosaics, draw_mosaics, empty_tiles
from secateur.tokens.attach import attach
from secateur.tokens.cost import llm_flops, tower_flops
from secateur.tokens.method import Facts, Stage, TokenMethod
from secateur.tokens.modules import Trained
from secateur.tokens.pyramid import Pyramid, pyramid
from secateur.tokens.state import TokenSets
from secateur.tokens.train import train_tokens
from secateur.training.recipe import Recipe
from secateur.utils.files import atomic_write_json

LAYERS, MOST, BASE, TARGET = (0, 1), 6, 3, "25%"
GRID, DISTILLED = 8 * BASE, (1, 2)
LESSONS = ((16, "base"), (8, "base"), (16, "half"), (16, "base"), (8, "half"), (8, "fine"))
"""Of the model's four layers those that look; tiles that are read at most; tiles on the base view's side; tokens of them that
stay; tokens on the base view's side; tiles on the side, and level, of the pictures that a look is trained on, in turn;
layers that are distilled."""


@dataclass
class RandomTiles(TokenMethod):
    """As many tiles of the finest level, and tokens of them, as `lrs-dip` keeps, drawn; the base view isn't read. No paper."""

    def stages(self, facts: Facts) -> list[Stage]:
        return [Stage("tiles", self.zoom), Stage("input", self.prune)]

    def zoom(self, sets: TokenSets) -> Tensor:
        assert sets.tiles is not None
        tiles = int(sets.tiles[0, sets.reading].prod())
        most = MOST if sets.reading == sets.tiles.shape[1] - 1 else 0
        return torch.rand(len(sets), tiles, generator=sets.generator).argsort(1).argsort(1) < most

    def prune(self, sets: TokenSets) -> Tensor:
        assert sets.level is not None
        fine = sets.level == sets.level.max()
        draw = torch.rand(sets.valid.shape, generator=sets.generator).masked_fill(~fine, 2)
        return sets.valid & (~fine | (draw.argsort(1).argsort(1) < round(0.25 * MOST * TOKENS)))


def views(picture: Tensor, zooms: int = 1) -> Pyramid:
    """Thumbnail, base view, with two zooms the picture at half its scale, and the picture as it is."""
    scales = (BASE * SIZE / picture.shape[1], *[0.5] * (zooms == 2), 1)
    return pyramid(picture, SIZE, base=BASE, scales_of=scales)


def over(tokens: int, tiles: int, held: int) -> Tensor:
    """bool [tokens, tokens]: of a square map those that lie, at least in part, on tile `held` of tiles x tiles."""
    line = torch.arange(tokens)
    marks = [
        (line * tiles // tokens <= at) & ((line * tiles + tiles - 1) // tokens >= at)
        for at in divmod(held, tiles)
    ]
    return marks[0][:, None] & marks[1]


def examples(model: Any, drawn: Mosaics, level: str) -> tuple[Tensor, Tensor]:
    """Visual tokens [B, n, 128], thumbnail first, and which of them lie on the tile that is asked about, bool [B, 1, n].

    In the base view of 16 x 16 tiles no shape can be told, so there each of the tiles with objects is asked for: [B, 4, n]. The others are the base view's, or (level "half" and "fine") those of the tiles with objects and some empty ones.
    """
    side = drawn.pictures.shape[-1] // SIZE
    crops, right = [], []
    for picture, held in zip(drawn.pictures, drawn.tiles.tolist()):
        first = pyramid(picture, SIZE, base=BASE, scales_of=(BASE / side,)).tiles
        if level == "base":
            crops.append(first)
            whole = [over(GRID, side, tile) for tile in (held if side == 16 else held[:1])]
            right.append(
                torch.stack([each.view(BASE, 8, BASE, 8).transpose(1, 2).flatten() for each in whole])
            )
            continue
        half = level == "half"
        wide = side // 2 if half else side
        made = pyramid(picture, SIZE, base=BASE, scales_of=(0.5 if half else 1,)).tiles[1:]
        owner = [t // side // 2 * wide + t % side // 2 if half else t for t in held]
        some = sorted({*owner, *[t for t in range(2 * MOST) if t not in owner][: MOST - len({*owner})]})
        crops.append(torch.cat([first[:1], made[some]]))
        on = over(8 * wide, side, held[0]).view(wide, 8, wide, 8).transpose(1, 2).reshape(-1, TOKENS)
        right.append(on[some].flatten()[None])
    with torch.no_grad():
        values = pixels(torch.stack(crops).flatten(0, 1), "llava")
        made = project(model, see(model, values)[0]).float().view(len(crops), -1, 128)
    marks = torch.stack(right)
    return made, torch.cat([torch.zeros(*marks.shape[:2], TOKENS, dtype=torch.bool), marks], 2)


def attended(model: Any, layers: torch.nn.ModuleList, visual: Tensor, questions: Tensor) -> Tensor:
    """[B, n - 64]: the last word's attention over the tokens behind the thumbnail, mean over heads."""
    words = model.get_input_embeddings()
    hidden = torch.cat([words(questions[:, :1]), visual, words(questions[:, 1:])], 1)
    cos, sin = model.get_decoder().rotary_emb(hidden, torch.arange(hidden.shape[1])[None])
    *before, last = layers
    for layer in before:
        hidden = layer(hidden, attention_mask=None, position_embeddings=(cos, sin))
    states = last.input_layernorm(hidden)

    def turned(x: Tensor, at: slice) -> Tensor:
        x = x.unflatten(-1, (-1, last.self_attn.head_dim))
        first, second = x.chunk(2, -1)
        return x * cos[:, at, None] + torch.cat([-second, first], -1) * sin[:, at, None]

    local = slice(1 + TOKENS, 1 + visual.shape[1])
    q = turned(last.self_attn.q_proj(states[:, -1:]), slice(-1, None))
    k = turned(last.self_attn.k_proj(states[:, local]), local)
    logits = torch.einsum("bqhd,bkhd->bhk", q, k).float() * last.self_attn.head_dim**-0.5
    return logits.softmax(-1).mean(1)


def train_look(
    model: Any, seed: int, pictures: int, steps: int, batch: int, rate: float
) -> dict[str, Tensor]:
    """Copies of the layers that look, trained to attend to the tile that is asked about; everything else is frozen."""
    generator = torch.Generator().manual_seed(50_000_000 + seed)
    background, lessons = empty_tiles(2 * EMPTY, generator), []
    for start in range(0, pictures, batch):
        side, level = LESSONS[start // batch % len(LESSONS)]
        drawn = draw_mosaics(batch, side, generator, background)
        asks = torch.tensor([[BOS, *question] for question in drawn.questions])
        lessons.append((*examples(model, drawn, level), asks))
    layers = copy.deepcopy(torch.nn.ModuleList(model.get_decoder().layers[n] for n in LAYERS)).train()
    optimizer = torch.optim.AdamW(layers.parameters(), lr=rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps)
    for step in range(steps):
        visual, right, asks = lessons[step % len(lessons)]
        found = attended(model, layers, visual, asks)
        loss = -(found[:, None] * right[..., TOKENS:]).sum(2).clamp(min=1e-9).log().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(layers.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 20 == 0 or step == steps - 1:
            print(f"# seed {seed} step {step}: loss {loss.item():.2f}", flush=True)
    return {
        f"{n}.{name}": p.detach() for n, layer in zip(LAYERS, layers) for name, p in layer.named_parameters()
    }


def distil(model: Any, seed: int, steps: int, batch: int, rate: float) -> Trained:
    """The layers of `DISTILLED`, by the losses of the authors' code, on base views of mosaics; everything else is frozen."""
    generator = torch.Generator().manual_seed(70_000_000 + seed)
    background, data = empty_tiles(2 * EMPTY, generator), []
    for number in range(max(1, steps // 4)):
        side = (8, 16)[number % 2]
        drawn = draw_mosaics(batch, side, generator, background)
        made = [pyramid(picture, SIZE, base=BASE, scales_of=(BASE / side,)) for picture in drawn.pictures]
        asked = [[*question, answer] for question, answer in zip(drawn.questions, drawn.answers.tolist())]
        given = prompts(torch.stack([each.tiles for each in made]), asked, 1 + BASE**2)
        labels = torch.full_like(given["input_ids"], -100)
        labels[:, -1] = drawn.answers
        data.append({**given, "labels": labels})
    recipe = Recipe(lr=rate, batch=batch)
    return train_tokens(
        model, "lrs-dip", data=data, target=TARGET, steps=steps, seed=seed, recipe=recipe,
        given={"pyramid": made[0]}, layers=DISTILLED,
    )  # fmt: skip


def flops(tower: int, tokens: int, facts: Facts) -> float:
    """Of a prefill of `tokens`, and `tower` crops."""
    return llm_flops([float(tokens)] * facts.layers, facts) + tower_flops(
        [(TOKENS + 1.0) * tower] * facts.blocks, tower, facts
    )


def prompts(tiles: Tensor, questions: list[list[int]], places: int) -> dict[str, Tensor]:
    """Keyword arguments of the model: tiles [B, P, 3, 64, 64] of one picture a row, a prompt with so many of their places, and the question."""
    ids = torch.tensor([[BOS, *[IMAGE] * TOKENS * places, *question] for question in questions])
    values = pixels(tiles.flatten(0, 1), "llava")
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": values}


def method_of(way: str, file: str) -> tuple[Any, dict[str, Any]]:
    """A token method and its hyperparameters; None: the model alone."""
    if way == "random tiles":
        return RandomTiles(), {}
    if "lrs-dip" not in way:
        return None, {}
    more: dict[str, Any] = {"most": MOST, "rank": "scores", "zooms": zooms_of(way)}
    if "distilled" in way:
        return "lrs-dip", {
            **more,
            "weights": file.replace("look-", "distilled-").removesuffix(".safetensors"),
        }
    more["layers"] = (0, *DISTILLED) if "three" in way else LAYERS
    return "lrs-dip", more if "untrained" in way else {**more, "rfm": file}


def zooms_of(way: str) -> int:
    return 2 if "two zooms" in way else 1


@torch.no_grad()
def one(model: Any, way: str, drawn: Mosaics, file: str, batch: int) -> dict[str, float]:
    """Accuracy, multiply-adds and seconds of one question, tiles through the tower, and tokens that the language model reads."""
    method, more = method_of(way, file)
    right, cost, tiles, tokens, found, seconds = 0, 0.0, 0, 0, 0, 0.0
    for start in range(0, len(drawn.questions), batch):
        rows = slice(start, start + batch)
        made = [views(picture, zooms_of(way)) for picture in drawn.pictures[rows]]
        part = {
            "thumbnail": slice(0, 1),
            "base view": slice(0, 1 + BASE**2),
            "all tiles": slice(1 + BASE**2, None),
        }
        shown = torch.stack([each.tiles[part.get(way, slice(None))] for each in made])
        given = prompts(shown, drawn.questions[rows], shown.shape[1] if method is None else 1)
        if method is None:
            begun = time.process_time()
            out = model(**given, logits_to_keep=1, use_cache=False)
            seconds += time.process_time() - begun
            facts = attach(model, "random-tokens", target="100%")
            facts.detach()
            tiles += shown.shape[0] * shown.shape[1]
            tokens += int(given["attention_mask"].sum())
            cost += len(made) * flops(shown.shape[1], given["input_ids"].shape[1], facts.facts)
        else:
            with attach(model, method, target=TARGET, given={"pyramid": made}, **more) as attached:
                begun = time.process_time()
                out = model(**given, logits_to_keep=1, use_cache=False)
                seconds += time.process_time() - begun
                after = attached.report["after"]
            cost += after["flops"] + after["tower_flops"]
            tiles += after["tiles"]
            tokens += sum(attached.report["lengths"][0])
            coarse = sum(level.rows * level.cols for level in made[0].levels[:-1])
            for row, held in zip(attached.kept["tiles"], drawn.tiles[rows, 0].tolist()):
                found += coarse + held in (row // TOKENS).unique().tolist()
        right += int((out.logits[:, -1].argmax(-1) == drawn.answers[rows]).sum())
    n = len(drawn.questions)
    per = {
        "accuracy": 100 * right,
        "tiles": tiles,
        "tokens": tokens,
        "mflops": cost / 1e6,
        "found": 100 * found,
    }
    return {name: value / n for name, value in {**per, "seconds": seconds}.items()}


def timed(model: Any, sides: list[int], rounds: int, batch: int) -> None:
    """Processor seconds of a question at each size, the sizes in turn, and their ratio to the first: medians and quartiles."""
    ways = ("base view", "lrs-dip, untrained, one zoom", "lrs-dip, untrained, two zooms")
    drawn = {side: draw_mosaics(batch, side, torch.Generator().manual_seed(side)) for side in sides}
    seconds: dict[tuple[str, int], list[float]] = {(way, side): [] for way in ways for side in sides}
    for number in range(rounds + 1):  # the first warms up
        for way in ways:
            for side in sides:
                spent = one(model, way, drawn[side], "", batch)["seconds"]
                if number:
                    seconds[way, side].append(spent)
    print("| way | pixels | CPU s, median | ratio to the smallest, median (quartiles) |")
    print("|---|---|---|---|")
    for way in ways:
        for side in sides:
            ratios = [a / b for a, b in zip(seconds[way, side], seconds[way, sides[0]])]
            low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
            median = statistics.median(seconds[way, side])
            print(f"| {way} | {64 * side} | {median:.3f} | {middle:.2f} ({low:.2f} to {high:.2f}) |")


WAYS = (
    "thumbnail",
    "base view",
    "random tiles",
    "lrs-dip, untrained, one zoom",
    "lrs-dip, untrained three layers, one zoom",
    "lrs-dip, distilled, one zoom",
    "lrs-dip, one zoom",
    "lrs-dip, two zooms",
    "all tiles",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sides", default="8,16", help="tiles of 64 pixels on a picture's side")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--limit", type=int, default=64, help="questions")
    parser.add_argument(
        "--every", type=int, default=16, help="questions with all tiles, which at 1,024 pixels aren't run"
    )
    parser.add_argument(
        "--time", type=int, default=0, help="rounds of the timing, which is then all that runs"
    )
    parser.add_argument("--ways", help="a part of the ways, by ;")
    parser.add_argument("--pictures", type=int, default=1536)
    parser.add_argument("--steps", type=int, default=480)
    parser.add_argument("--distil", type=int, default=64, help="steps by the authors' losses")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--work", type=Path, help="keeps the trained layers")
    parser.add_argument("--out", type=Path, help="every row as JSON; a run goes on from it")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows: dict[str, Any] = json.loads(args.out.read_text()) if args.out and args.out.exists() else {}
    work = args.work or Path(tempfile.mkdtemp())
    work.mkdir(parents=True, exist_ok=True)
    sides, seeds = ([int(n) for n in text.split(",")] for text in (args.sides, args.seeds))
    ways = args.ways.split(";") if args.ways else WAYS
    if args.time:
        return timed(load_scenes("llava", seeds[0]), sides, args.time, 8)
    for seed in seeds:
        model = load_scenes("llava", seed)
        file = work / f"look-{seed}.safetensors"
        if not file.exists():
            begun = time.process_time()
            save_file(train_look(model, seed, args.pictures, args.steps, args.batch, args.rate), file)
            print(f"# seed {seed}: trained in {time.process_time() - begun:.0f} s", flush=True)
        folder = work / f"distilled-{seed}"
        if not folder.exists() and any("distilled" in way for way in ways):
            begun = time.process_time()
            trained = distil(model, seed, args.distil, args.batch, args.rate / 2)
            trained.save(folder)
            first, last = (trained.about["lessons"][0][name] for name in ("first", "last"))
            print(
                f"# seed {seed}: distilled in {time.process_time() - begun:.0f} s, loss {first:.4f} to {last:.4f}"
            )
        for side in sides:
            drawn = draw_mosaics(args.limit, side, torch.Generator().manual_seed(60_000_000 + side))
            for way in ways:
                key = f"{way} {side} {seed}"
                if way == "all tiles" and side > 8 or key in rows:
                    continue
                every = drawn
                if way == "all tiles":
                    n = args.every
                    every = Mosaics(
                        drawn.pictures[:n], drawn.questions[:n], drawn.answers[:n], drawn.tiles[:n]
                    )
                rows[key] = one(model, way, every, str(file), 1 if way == "all tiles" else 8)
                print(f"# {key}: {rows[key]}", flush=True)
                if args.out:
                    atomic_write_json(args.out, rows)
    print("| pixels | way | accuracy, % | the tile is read, % | tiles | tokens | M multiply-adds | CPU s |")
    print("|---|---|---|---|---|---|---|---|")
    for side in sides:
        for way in WAYS:
            mine = [rows[f"{way} {side} {seed}"] for seed in seeds if f"{way} {side} {seed}" in rows]
            if not mine:
                continue
            accuracy = [row["accuracy"] for row in mine]
            mean = {name: spread([row[name] for row in mine])[0] for name in mine[0]}
            read = f"{mean['found']:.0f}" if "dip" in way or "random" in way else "-"
            print(
                f"| {64 * side} | {way} | {mean['accuracy']:.1f} ± {deviation(accuracy):.1f} | {read} | {mean['tiles']:.0f} "
                f"| {mean['tokens']:.0f} | {mean['mflops']:.0f} | {mean['seconds']:.2f} |"
            )


if __name__ == "__main__":
    main()
