"""The shape that TAS finds against a uniform and a random one, at equal multiply-adds, with equal distillation.

    python benchmarks/tas.py                                                    # digits, three seeds: about 8 CPU minutes
    python benchmarks/tas.py --networks cifar10:resnet20 --target "macs<=50%" --seeds 1 --epochs 1 --search 0.8 \\
        --train 16000 --test 5000 --batch 64 --lr 0.05 --shape-lr 0.05          # about 10 CPU minutes
    python benchmarks/tas.py --smoke                                            # a few steps: does it run

Every row is a small network that begins untrained, has the same teacher, rates, data and order, and the same budget.

  tas      widths and depths that a search found; the search comes on top of the training
  uniform  the same share of every layer's width, all blocks
  random   widths and depths drawn by chance

Printed: accuracy at the end, multiply-adds and parameters that are left, the blocks of each stage.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from pathlib import Path
from typing import Any, ClassVar

import torch
from rows import keep, spread
from torch import Tensor

import secateur
from secateur.methods.tas import TAS
from secateur.pruning.context import Context
from secateur.tasks import load_task
from secateur.training.job import Job

METHODS = ("tas", "uniform", "random")


@dataclasses.dataclass
class Shape(TAS):
    """TAS with a shape that nobody searched."""

    by: str = "uniform"

    name: ClassVar[str] = "shape"

    def sizes(self, job: Job, context: Context) -> dict[str, Tensor]:
        scores = {}
        for group in context.groups:
            if self.by == "uniform" and group.kind == "layers":
                continue
            generator = job.generator("shape", group.name)
            lift = torch.rand((), generator=generator) if self.by == "random" else 0.0
            scores[group.name] = lift - torch.arange(group.size, dtype=torch.float64) / group.size
        keep = context.allocate(scores, "global")
        cost, limit = context.cost()
        for group in context.groups:  # what still fits: the allocation closes all groups of a size at once
            while group.name in keep and len(keep[group.name]) < group.size:
                wider = {**keep, group.name: torch.arange(len(keep[group.name]) + 1)}
                if cost(wider) > limit:
                    break
                keep = wider
        return keep


def one(network: str, method: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """A run: its figures."""
    started = time.process_time()
    task = load_task(network, train=args.train, test=args.test, split=args.split)
    chosen = (
        TAS(shape_lr=args.shape_lr, search=args.search, cost=args.cost)
        if method == "tas"
        else Shape(by=method)
    )
    recipe = {name: getattr(args, name) for name in ("lr", "optimizer", "batch") if getattr(args, name)}
    pruned = secateur.train_prune(
        task, method=chosen, target=args.target, epochs=args.epochs, seed=seed, **recipe
    )
    report, row = pruned.report, pruned.report["phases"][0]
    return {
        "network": network,
        "method": method,
        "seed": seed,
        "before": report["before"]["quality"],
        "end": report["after"]["quality"],
        "macs": report["after"]["macs"] / report["before"]["macs"],
        "params": report["after"]["params"] / report["before"]["params"],
        "likeliest": row.get("share_of_the_likeliest"),
        "kept": {g["name"]: [g["kept"], g["size"]] for g in report["groups"] if g["reason"] is None},
        "cpu_seconds": time.process_time() - started,
    }


def table(found: list[dict[str, Any]]) -> None:
    """One row a shape: means over seeds, and two standard errors of the accuracy."""
    for network in dict.fromkeys(row["network"] for row in found):
        before = next(row["before"] for row in found if row["network"] == network)
        print(f"\n{network}: {before:.2%} before")
        print(f"{'shape':10s} {'end':>8s} {'± 2 s.e.':>9s} {'MACs':>6s} {'params':>7s} {'CPU s':>6s}  blocks")
        for method in METHODS:
            rows = [row for row in found if (row["network"], row["method"]) == (network, method)]
            if not rows:
                continue
            ends = [row["end"] for row in rows]
            end, error = spread(ends)
            mean = {k: statistics.mean(row[k] for row in rows) for k in ("macs", "params", "cpu_seconds")}
            blocks = [
                "-".join(str(n) for name, (n, _) in row["kept"].items() if name.endswith(":layers"))
                for row in rows
            ]
            print(
                f"{method:10s} {end:8.2%} {error:9.2%} {mean['macs']:6.1%} {mean['params']:7.1%}"
                f" {mean['cpu_seconds']:6.0f}  {', '.join(blocks)}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", nargs="*", default=["digits:digits-resnet", "digits:digits-cnn"])
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=METHODS)
    parser.add_argument("--target", default="macs<=25%")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--epochs", type=float, default=20)
    parser.add_argument("--search", type=float, default=1.0, help="the search, in lengths of the training")
    parser.add_argument("--shape-lr", type=float, default=0.02)
    parser.add_argument("--cost", type=float, default=2.0)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--optimizer")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--train", type=int)
    parser.add_argument("--test", type=int)
    parser.add_argument("--split", default="test", choices=("test", "val"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    if args.smoke:
        args.seeds, args.train, args.test, args.epochs = 1, 128, 50, 1
    torch.set_num_threads(args.threads)
    found: list[dict[str, Any]] = []
    for network in args.networks:
        for seed in range(args.first_seed, args.first_seed + args.seeds):
            for method in args.methods:
                keep(found, one(network, method, seed, args), args.json)
    table(found)


if __name__ == "__main__":
    main()
