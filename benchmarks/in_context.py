"""Demonstrations before the question on scenes: can the models read several pictures, and what does `catp` keep of them?

    python benchmarks/in_context.py [--shots 0,1,2,4] [--limit 128] [--target 22.2%] [--seeds 0,1,2]

A prompt is picture, question, answer for each demonstration (of the same kind of question, from other test pictures), then
the picture and question that are asked.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.tasks.scenes.draw import IMAGE, KINDS
from secateur.tasks.scenes.evaluate import deviation
from secateur.tasks.scenes.models import TOKENS, frame, load_scenes, pixels
from secateur.tasks.scenes.questions import Group, test_set
from secateur.tokens.attach import attach
from secateur.tokens.select import top_per_row
from secateur.tokens.state import TokenSets
from secateur.utils.files import atomic_write_json

BATCH = 32
Sample = tuple[Tensor, list[int], int]
"""A picture, the words of a question about it, and the answer."""


def by_kind(groups: tuple[Group, ...]) -> dict[str, list[Sample]]:
    found: dict[str, list[Sample]] = {kind: [] for kind in KINDS}
    for group in groups:
        found[group.kind] += zip(group.pictures, group.questions, group.answers.tolist())
    return found


def prompt(samples: list[Sample], variant: str = "llava") -> list[int]:
    """Word numbers: the last sample's answer is left out."""
    before, after = frame(variant)
    words: list[int] = list(before)
    for _, question, answer in samples:
        words += [*[IMAGE] * TOKENS, *after, *question, answer]
    return words[:-1]


def batch_of(rows: list[list[Sample]]) -> dict[str, Tensor]:
    ids = [prompt(row) for row in rows]
    longest = max(map(len, ids))
    pictures = torch.stack([picture for row in rows for picture, _, _ in row])
    return {
        "input_ids": torch.tensor([[0] * (longest - len(row)) + row for row in ids]),
        "attention_mask": torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in ids]),
        "pixel_values": pixels(pictures, "llava"),
    }


def drawn(every: list[Sample], shots: int, generator: torch.Generator) -> list[list[Sample]]:
    """Every sample behind some of the others."""
    rows = []
    for number, sample in enumerate(every):
        others = torch.randperm(len(every) - 1, generator=generator)[:shots].tolist()
        rows.append([every[i + (i >= number)] for i in others] + [sample])
    return rows


@torch.no_grad()
def answered(
    model: Any,
    samples: dict[str, list[Sample]],
    shots: int,
    seed: int,
    after: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Accuracy in percent by kind, each question behind `shots` drawn demonstrations."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for kind, every in samples.items():
        rows, right = drawn(every, shots, generator), 0
        for start in range(0, len(rows), BATCH):
            part = rows[start : start + BATCH]
            logits = model(**batch_of(part), logits_to_keep=1, use_cache=False).logits[:, -1]
            right += int((logits.argmax(-1) == torch.tensor([row[-1][2] for row in part])).sum())
            after()
        found[kind] = 100 * right / len(rows)
    return found


def behind_one_layer(sets: TokenSets) -> Tensor:
    return top_per_row(sets.attention("layer:1", rows="last"), sets.keep, sets.valid)


WAYS: dict[str, tuple[Any, dict[str, Any]] | None] = {
    "all tokens": None,
    "catp": ("catp", {}),
    "random-tokens": ("random-tokens", {}),
    "random-tokens, about catp's work": ("random-tokens", {"target": "44%"}),
    "attention of layer 1, all pictures together": (
        behind_one_layer,
        {"at": "layer:2", "records": ("layer:1",), "scope": "row"},
    ),
}


def one(samples: dict[str, list[Sample]], shots: int, seed: int, way: Any, target: str) -> dict[str, float]:
    model = load_scenes("llava", seed)
    if way is None:
        return answered(model, samples, shots, seed) | {"work": 100.0}
    with attach(model, way[0], **{"target": target, "seed": seed, **way[1]}) as attached:
        scores = answered(model, samples, shots, seed)
        before, after = (attached.report[when]["tokens_x_layers"] for when in ("before", "after"))
    return scores | {"work": 100 * after / before}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shots", default="0,1,2,4")
    parser.add_argument("--limit", type=int, default=128, help="test pictures")
    parser.add_argument("--target", default="22.2%")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--out", type=Path, help="every score as JSON; a run goes on from it")
    args = parser.parse_args()
    torch.set_num_threads(1)
    samples = by_kind(test_set(args.limit))
    settings = {"limit": args.limit, "target": args.target}
    there = json.loads(args.out.read_text()) if args.out and args.out.exists() else {}
    kept = there["scores"] if there.get("settings") == settings else {}
    print(
        f"| demonstrations | way | tokens x layers | {' | '.join(KINDS)} | mean |\n|---|---|---|"
        + "---|" * (len(KINDS) + 1)
    )
    for shots in map(int, args.shots.split(",")):
        for name, way in WAYS.items():
            scores = []
            for seed in map(int, args.seeds.split(",")):
                key = f"{shots} {name} {seed}"
                if key not in kept:
                    kept[key] = one(samples, shots, seed, way, args.target)
                    if args.out:
                        atomic_write_json(args.out, {"settings": settings, "scores": kept})
                scores.append(kept[key])
            columns = [[score[kind] for score in scores] for kind in KINDS]
            columns.append([sum(column) / len(KINDS) for column in zip(*columns)])
            cells = " | ".join(f"{sum(c) / len(c):.1f} ± {deviation(c):.1f}" for c in columns)
            print(f"| {shots} | {name} | {scores[0]['work']:.0f} % | {cells} |", flush=True)


if __name__ == "__main__":
    main()
