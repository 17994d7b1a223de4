"""`scenes:seg`: the mask of the object that a question names, under token methods that do the same work.

    python benchmarks/scenes_seg.py --out seg.jsonl [--seeds 0,1,2] [--limit 256] [--tune 100]

Methods let 88 tokens x layers of 256 through, 65.6 % fewer. Each model is scored as it comes, and again after steps in which its
language model and the read-out are trained on masks under the method. Other settings of `lvlm-csp` are scored on other pictures.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.tasks.scenes.evaluate import deviation
from secateur.tasks.scenes.models import TOKENS, load_scenes
from secateur.tasks.scenes.questions import TEST_SEED
from secateur.tasks.scenes.segment import Referred, overlap, referred, seen, states, train_reader, tune
from secateur.tokens.attach import attach
from secateur.tokens.state import TokenSets

OTHERS_SEED = 41_000_000
Way = tuple[Any, dict[str, Any]]


def even(sets: TokenSets) -> Tensor:
    """Every N/k-th token in raster order."""
    keep = torch.zeros_like(sets.valid)
    for row, count, most in zip(keep, sets.count.tolist(), sets.keep.tolist()):
        row[[number * count // most for number in range(most)]] = True
    return keep


def csp(l1: int, l2: int, clusters: int = 8, left: int = 8, **more: Any) -> Way:
    return "lvlm-csp", {
        "target": f"tokens={left}",
        "clusters": f"tokens={clusters}",
        "l1": l1,
        "l2": l2,
        **more,
    }


WAYS: dict[str, Way | None] = {
    "all tokens": None,
    "lvlm-csp: 8, 8, 64, 8": csp(2, 3),
    "lvlm-csp: 8, 64, 8, 8": csp(1, 2),
    "lvlm-csp in the order few, few, all: 8, 8, 8, 64": csp(3, 4),
    "fastv: 64, 8, 8, 8": ("fastv", {"target": "tokens=8", "k": 1}),
    "uniform: 22, 22, 22, 22": (even, {"target": "tokens=22"}),
    "random-tokens: 22, 22, 22, 22": ("random-tokens", {"target": "tokens=22"}),
    "one random token": ("random-tokens", {"target": "tokens=1"}),
}
SWEEP: dict[str, Way | None] = {
    "8, 8, 64, 8": csp(2, 3),
    "11, 11, 64, 2": csp(2, 3, 11, 2),
    "4, 4, 64, 16": csp(2, 3, 4, 16),
    "8, 64, 8, 8": csp(1, 2),
    "16, 64, 4, 4": csp(1, 2, 16, 4),
    "8, 8, 64, 8 random": csp(2, 3, choose="random"),
    "8, 8, 64, 8 cls": csp(2, 3, choose="cls"),
    "8, 8, 64, 8 seg": csp(2, 3, choose="seg"),
    "8, 8, 64, 8 delta": csp(2, 3, reenter="delta"),
    "16, 64, 4, 4 seg": csp(1, 2, 16, 4, choose="seg"),
    "16, 64, 4, 4 delta": csp(1, 2, 16, 4, reenter="delta"),
}


def instances_of(given: dict[str, Any]) -> Callable[[Referred], None]:
    """Hands a method the true masks of each picture's objects."""

    def before(part: Referred) -> None:
        given["instances"] = [owner == owner.unique()[owner.unique() >= 0][:, None] for owner in part.owner]

    return before


def one(way: Way | None, seed: int, data: Referred, steps: int, reader: Any) -> dict[str, Any]:
    """The mean IoU of one way and seed in percent, and its tokens x layers."""
    model, reader = load_scenes("llava", seed), copy.deepcopy(reader)
    if way is None:
        if steps:
            tune(model, reader, seed, steps)
        found, work = states(model, data), 4.0 * TOKENS
    else:
        with attach(model, way[0], seed=seed, **way[1]) as attached:
            before = instances_of(attached.setup.given)
            if steps:
                tune(model, reader, seed, steps, before=before)
            found = states(model, data, before=before)
            counts = attached.report
            work = counts["after"]["tokens_x_layers"] / counts["before"]["visual_tokens"] * TOKENS
    return {"iou": 100 * float(overlap(reader, found, seen(model, data), data.masks).mean()), "work": work}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--limit", type=int, default=256, help="pictures")
    parser.add_argument("--tune", type=int, default=100, help="steps, 0 for none")
    parser.add_argument(
        "--out", type=Path, required=True, help="a line of JSON a score; a run goes on from it"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.exists() else []
    test, others = referred(args.limit, TEST_SEED), referred(args.limit, OTHERS_SEED)
    tuned = {name: way for name, way in WAYS.items() if args.tune and "," in name}
    parts = [("as they come", WAYS, test, 0), (f"{args.tune} steps of tuning", tuned, test, args.tune)]
    parts.insert(1, ("other settings, other pictures", SWEEP, others, 0))

    def scores(part: str, name: str) -> list[dict[str, Any]]:
        return [row for row in rows if (row["part"], row["way"], row["limit"]) == (part, name, args.limit)]

    for seed in map(int, args.seeds.split(",")):
        reader = None
        for part, ways, data, steps in parts:
            for name, way in ways.items():
                if any(row["seed"] == seed for row in scores(part, name)):
                    continue
                reader = train_reader(load_scenes("llava", seed), seed) if reader is None else reader
                begun = time.process_time()
                row = {"part": part, "way": name, "seed": seed, "limit": args.limit}
                row |= one(way, seed, data, steps, reader)
                rows.append(row | {"seconds": round(time.process_time() - begun, 1)})
                with args.out.open("a") as file:
                    file.write(json.dumps(rows[-1]) + "\n")
                print(json.dumps(rows[-1]), flush=True)
    for part, ways, _, _ in parts:
        print(f"\n{part}\n\n| way | tokens x layers | IoU |\n|---|---|---|")
        for name in ways:
            found = [row["iou"] for row in scores(part, name)]
            work = scores(part, name)[0]["work"]
            print(f"| {name} | {work:.0f} | {sum(found) / len(found):.1f} ± {deviation(found):.1f} |")


if __name__ == "__main__":
    main()
