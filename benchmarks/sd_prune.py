"""How much of which part can leave: magnitude, Wanda and chance on models that draw digits, and where each breaks.

    python benchmarks/sd_prune.py                       # both models, three seeds
    python benchmarks/sd_prune.py --models mnist-dit    # only the one without parts
    python benchmarks/sd_prune.py --smoke               # a few drawings: does it run

Linear and convolution layers count, nothing is repaired. Printed for each part and share removed: how many drawings are the digit that
was asked for, and their distance (mean squared error) from the dense model's of the same noise; then the largest share, in
steps of 2.5 %, that costs at most 5 points, and the points lost for each percent beyond it. A seed gives other noise, other
calibration drawings of Wanda (all steps, all branches of guidance) and other random weights.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rows import spread
from torch import Tensor, nn

import secateur
from secateur.graph.parts import parts_of
from secateur.measure.vision import accuracy
from secateur.tasks import load_task
from secateur.tasks.digits_diffusion import nearest_digits
from secateur.tasks.mnist_dit import load_judge
from secateur.tasks.networks.digits_diffusion import prompts
from secateur.training.sampling import draw, visited

METHODS: dict[str, dict[str, Any]] = {
    "sd-prune": {"method": "sd-prune"},
    "sd-prune, one ranking": {"method": "sd-prune", "scope": "part"},
    "wanda": {"method": "wanda", "everywhere": True},
    "random": {"method": "random", "everywhere": True},
}
NOISE = 1_000_000


def right(name: str, drawings: Tensor, asked: Tensor) -> float:
    """The share of drawings that are the digit that was asked for."""
    if name == "mnist-dit":
        return accuracy(load_judge(), drawings, asked, batch=200)
    return (nearest_digits(drawings) == prompts(len(drawings))[1]).float().mean().item()


def runs(name: str, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for each seed, part, method and share, and one for each cliff."""
    task = load_task(name)
    dense = task.pretrained().eval()
    sampler = task.sampler
    for seed in range(args.seeds):
        before, asked = draw(dense, sampler, args.count, NOISE + seed)
        data = visited(dense, sampler, args.samples, seed)

        def judged(model: nn.Module) -> tuple[float, float]:
            drawings, _ = draw(model.eval(), sampler, args.count, NOISE + seed)  # noqa: B023
            return right(name, drawings, asked), ((drawings - before) ** 2).mean().item()  # noqa: B023

        whole = right(name, before, asked)
        for part in [*parts_of(dense), None] if args.parts is None else args.parts:
            for method in args.methods:
                settings = {**METHODS[method], "inputs": task.inputs, "seed": seed}
                if method == "wanda":
                    settings["data"] = data
                row = {"model": name, "seed": seed, "part": part or "all", "method": method, "dense": whole}
                yield from curve(dense, part, settings, judged, row, args)


def curve(
    dense: nn.Module,
    part: str | None,
    settings: dict[str, Any],
    judged: Callable[[nn.Module], tuple[float, float]],
    row: dict[str, Any],
    args: argparse.Namespace,
) -> Iterator[dict[str, Any]]:
    for removed in args.removed:
        share = f"{100 - removed:g}%"
        target = f"{part}={share}" if part else share
        pruned = secateur.prune(copy.deepcopy(dense), target=target, **settings)
        found = dict(zip(("asked", "distance"), judged(pruned.model)))
        yield {**row, "removed": removed, **found}
    cliff = secateur.threshold(
        dense, lambda model: judged(model)[0], part=part, tolerance=args.tolerance, step=args.step, **settings
    )
    yield {**row, "cliff": 100 * cliff.removed, "slope": cliff.slope}


def table(rows: list[dict[str, Any]], removed: list[float]) -> None:
    """The means over the seeds."""
    for model, part in dict.fromkeys((row["model"], row["part"]) for row in rows):
        own = [row for row in rows if (row["model"], row["part"]) == (model, part)]
        print(f"\n{model}, {part}; nothing removed: {spread([r['dense'] for r in own])[0]:.1%}")
        print(
            "| method | " + " | ".join(f"{share:g} %" for share in removed) + " | cliff | points a percent |"
        )
        for method in dict.fromkeys(row["method"] for row in own):
            cells = []
            for share in removed:
                at = [r for r in own if r["method"] == method and r.get("removed") == share]
                mean, error = spread([r["asked"] for r in at])
                distance = statistics.mean(r["distance"] for r in at)
                cells.append(f"{100 * mean:.1f} ± {100 * error:.1f} ({distance:.3f})")
            ends = [row for row in own if row["method"] == method and "cliff" in row]
            places = ", ".join(f"{row['cliff']:g}" for row in ends)
            slope = statistics.mean(row["slope"] for row in ends)
            print(f"| {method} | {' | '.join(cells)} | {places} | {slope:.1f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    models = ("digits-diffusion", "mnist-dit")
    parser.add_argument("--models", nargs="*", default=list(models), choices=models)
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=METHODS)
    parser.add_argument("--parts", nargs="*", help="default: each part, and all of them")
    parser.add_argument("--removed", nargs="*", type=float, default=[20.0, 30.0, 40.0, 50.0, 60.0, 75.0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--count", type=int, default=100, help="drawings that are judged")
    parser.add_argument("--samples", type=int, default=20, help="drawings that Wanda's norms are taken from")
    parser.add_argument("--tolerance", type=float, default=0.05)
    parser.add_argument("--step", type=float, default=0.025)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    if args.smoke:
        args.seeds, args.count, args.samples, args.removed, args.step = 1, 10, 2, [50.0], 0.25
    torch.set_num_threads(args.threads)
    found: list[dict[str, Any]] = []
    for name in args.models:
        started = time.process_time()
        for row in runs(name, args):
            found.append(row)
            print(json.dumps(row), flush=True)
            if args.json:
                args.json.write_text(json.dumps(found, indent=1))
        print(f"{name}: {time.process_time() - started:.0f} CPU seconds")
    table(found, args.removed)


if __name__ == "__main__":
    main()
