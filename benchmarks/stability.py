"""Lottery tickets by the rewinding step: quality and stability, of the ticket and of a random mask, mean over seeds.

    python benchmarks/stability.py digits --target 5% --rewind 0it 5it 15it 40it --epochs 8 --rounds 3 --seeds 3
    python benchmarks/stability.py cifar10 --target 16.7% --rewind 0it 100it 500it 2000it --device cuda

Runs `secateur.train_prune(task, method="lottery-rewinding", stability=1, controls=("reinit",))` for each step and seed.
Distances are between weights where the mask is (Frankle et al. 2019, arXiv 1903.01611); angles in degrees; the barrier is
the fall of quality on the line between two runs in different data orders.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import secateur
from secateur.tasks import load_task

FIGURES = ("quality", "prune_distance", "order_distance", "prune_angle", "order_angle", "order_barrier")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task")
    parser.add_argument("--target", default="20%")
    parser.add_argument("--rewind", nargs="+", default=["0it", "100it", "500it", "2000it"])
    parser.add_argument("--epochs", type=float, default=None)
    parser.add_argument("--rounds", type=int, default=None)
    parser.add_argument("--lr", type=float, default=None)
    parser.add_argument("--optimizer", default=None)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--train", type=int, default=None)
    parser.add_argument("--device", default=None)
    parser.add_argument("--out", default=None, help="a JSON file")
    args = parser.parse_args()
    task = load_task(args.task, train=args.train)
    given = {
        key: getattr(args, key) for key in ("rounds", "lr", "optimizer") if getattr(args, key) is not None
    }
    rows: list[dict[str, Any]] = []
    print(f"{'rewind':>8} {'mask':>8} " + " ".join(f"{name:>15}" for name in FIGURES))
    for rewind in args.rewind:
        found: dict[str, list[dict[str, Any]]] = {"whole": [], "ticket": [], "random": [], "reinit": []}
        begun = time.perf_counter()
        for seed in range(args.seeds):
            report = secateur.train_prune(
                task,
                method="lottery-rewinding",
                target=args.target,
                rewind=rewind,
                epochs=args.epochs,
                seed=seed,
                stability=1,
                controls=("reinit",),
                device=args.device,
                **given,
            ).report
            for phase in report["phases"]:
                kind = phase.get("mask") or {"level-0": "whole", "reinit": "reinit"}.get(phase["phase"])
                if kind:
                    found[kind].append({name: phase.get(name) for name in FIGURES})
        for kind, each in found.items():
            means = {
                name: statistics.mean(values)
                for name in FIGURES
                if None not in (values := [e[name] for e in each])
            }
            rows.append({"rewind": rewind, "mask": kind, **means, "each": each})
            print(
                f"{rewind:>8} {kind:>8} "
                + " ".join(f"{means[n]:15.4f}" if n in means else " " * 15 for n in FIGURES)
            )
        print(f"{time.perf_counter() - begun:.0f} s", flush=True)
        if args.out:
            result = {"settings": vars(args), "rows": rows}
            Path(args.out).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
