"""EfficientLLM inside a training, against the same saliency at once, other methods and random units, each trained as long.

    python benchmarks/efficientllm.py            # three seeds: about 20 minutes of one core; needs SECATEUR_DATA
    python benchmarks/efficientllm.py --smoke    # does it run

The network is the task `text`: a 231 k parameter decoder that was trained on stories. Each seed first trains it on
`--dense` steps of Brown and two novels. Then all methods have `--steps` steps of the same text, and half of the parameters leave: on the way (`inside`),
by one cut after eight steps (`at once`: the same saliency, averaged over these steps, with the same update), or before the
first step (the other methods, calibrated on 64 windows). Printed: perplexity of held-out windows, the processor time of the
cuts, and by how much the loss of the batch rises at each fourth cut with and without the update of the layers that read
what leaves, measured on copies of the same network.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from rows import keep
from torch import nn

import secateur
from secateur.methods.efficientllm import EfficientLLM
from secateur.surgery import Shrinking
from secateur.tasks import load_task
from secateur.training import fit
from secateur.training.cuts import Cuts
from secateur.training.leaving import Leaving
from secateur.training.losses import default_loss
from secateur.training.task import Task

ONE = 8
SETTINGS: dict[str, dict[str, Any]] = {
    "inside": {},
    "inside, no update": {"update": False},
    "at once": {"interval": ONE, "begin": 0.0},
    "at once, no update": {"interval": ONE, "begin": 0.0, "update": False},
}
RIVALS = ("taylor", "flap", "nirvana", "random-structured")
METHODS = (*SETTINGS, *RIVALS)


class Watched(EfficientLLM):
    """Measures on copies what each fourth cut does to the loss of its batch, with and without the update."""

    name = "efficientllm-watched"
    jumps: list[tuple[float, float]]
    seconds = 0.0

    @torch.no_grad()
    def repair(self, state: Any, now: Shrinking, keep: Any) -> None:
        started = time.process_time()
        if len(self.seen) % 4 == 0:
            before, after = float(default_loss(now.model, state.batch)), []
            for update in (True, False):
                twin = Shrinking(copy.deepcopy(now.model), now.graph)
                if update:
                    super().repair(state, twin, now.relative(keep))
                twin.to(now.relative(keep))
                after.append(float(default_loss(twin.model, state.batch)) - before)
            self.jumps.append((after[0], after[1]))
        self.seen.append(state.step)
        Watched.seconds += time.process_time() - started
        super().repair(state, now, keep)


class Clock:
    """Processor seconds inside a function of a class, and how often it did something."""

    def __init__(self, owner: type, name: str):
        self.seconds, self.calls = 0.0, 0
        inner = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.process_time()
            try:
                return inner(*args, **kwargs)
            finally:
                self.seconds += time.process_time() - started
                self.calls += 1

        setattr(owner, name, timed)


def run(task: Task, model: nn.Module, method: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """The row of one method."""
    own = copy.copy(task)
    own.pretrained = lambda: copy.deepcopy(model)
    started, before = time.process_time(), {name: clock.seconds for name, clock in CLOCKS.items()}
    row: dict[str, Any] = {"method": method, "seed": seed}
    if method in SETTINGS:
        settings = dict(SETTINGS[method])
        if "interval" in settings:
            settings["end"] = ONE / args.steps
        elif args.end:
            settings["end"] = args.end
        made = Watched(**settings) if method == "inside" else EfficientLLM(**settings)
        made.jumps, made.seen = [], []  # type: ignore[attr-defined]
        Watched.seconds = 0.0
        pruned = secateur.train_prune(own, method=made, target=args.target, steps=args.steps, seed=seed)
        small, removals = pruned.model, pruned.report["phases"][-1]["removals"]
        row |= {"cuts": len({step for step, _, _ in removals}), "last": removals[-1][0]}
        row["removed"] = {kind: sum(k == kind for _, k, _ in removals) for kind in removals[0][2]}
        row["least"] = [removals[0][2], removals[-1][2]]
        row["jumps"] = made.jumps  # type: ignore[attr-defined]
        row |= {f"seconds_{name}": clock.seconds - before[name] for name, clock in CLOCKS.items()}
    else:
        small = secateur.prune(
            copy.deepcopy(model), task.inputs, method=method, target=args.target, data=task.train[:64], seed=seed, seqlen=128
        ).model  # fmt: skip
        row["cut"] = task.quality(small)  # type: ignore[misc]
        fit(small, task.train, steps=args.steps, seed=seed, recipe=task.recipe)
    row["seconds"] = time.process_time() - started - (Watched.seconds if method == "inside" else 0.0)
    row["params"] = sum(p.numel() for p in small.parameters()) / sum(p.numel() for p in model.parameters())
    row["perplexity"] = task.quality(small)  # type: ignore[misc]
    return row


CLOCKS = {
    "cut": Clock(Shrinking, "to"),
    "cuts": Clock(Cuts, "__call__"),
    "saliency": Clock(Leaving, "__call__"),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=METHODS)
    parser.add_argument("--target", default="params<=50%")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--dense", type=int, default=200)
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--train", type=int, default=6000, help="windows of 128 tokens to train on")
    parser.add_argument("--end", type=float, help="share of the steps by which all has left, inside")
    parser.add_argument("--split", default="test", choices=("test", "val"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--json", type=Path, help="rows are added to this file; those that are there aren't run again"
    )
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.smoke:
        args.seeds, args.dense, args.steps, args.train = [0], 2, 12, 96
    rows: list[dict[str, Any]] = json.loads(args.json.read_text()) if args.json and args.json.exists() else []
    task = load_task("text", args.split, train=args.train)
    for seed in args.seeds:
        done = {row["method"] for row in rows if row["seed"] == seed}
        if not set(args.methods) - done:
            continue
        model = task.pretrained()  # type: ignore[misc]
        fit(model, task.train, steps=args.dense, seed=100 + seed, recipe=task.recipe)
        if "dense" not in done:
            rows.append({"method": "dense", "seed": seed, "perplexity": task.quality(model), "params": 1.0})  # type: ignore[misc]
        for method in args.methods:
            if method in done:
                continue
            keep(rows, run(task, model, method, seed, args), args.json)
    print("\nmethod                perplexity, mean and its standard error     parameters  beside inside")
    inside = {row["seed"]: row["perplexity"] for row in rows if row["method"] == "inside"}
    for method in ("dense", *args.methods):
        own = {row["seed"]: row for row in rows if row["method"] == method}
        values = [row["perplexity"] for row in own.values()]
        gaps = [row["perplexity"] - inside[seed] for seed, row in own.items() if seed in inside]
        mean = lambda numbers: statistics.mean(numbers) if numbers else float("nan")
        error = lambda n: statistics.stdev(n) / len(n) ** 0.5 if len(n) > 1 else float("nan")
        left = mean([row["params"] for row in own.values()])
        print(
            f"{method:20s} {mean(values):8.2f} +- {error(values):.2f}   {left:.1%}   {mean(gaps):+.2f} +- {error(gaps):.2f}"
        )
    jumps = [jump for row in rows for jump in row.get("jumps", ())]
    if jumps:
        pairs = [without - updated for updated, without in jumps]
        print(
            f"\nloss of the batch at {len(jumps)} cuts: {statistics.mean(j[0] for j in jumps):+.4f} with the update, "
            f"{statistics.mean(j[1] for j in jumps):+.4f} without; lower by {statistics.mean(pairs):.4f}"
        )
    for row in rows:
        if row["method"] == "inside":
            of = row["seconds"]
            print(
                f"seed {row['seed']}: {row['cuts']} cuts, {of:.0f} processor seconds, of which "
                + ", ".join(f"{name} {row[f'seconds_{name}'] / of:.1%}" for name in CLOCKS)
            )


if __name__ == "__main__":
    main()
