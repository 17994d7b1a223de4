"""EcoDiff against random units, grouped magnitude and its own per-step loss, on small transformers that draw digits.

    python benchmarks/ecodiff.py              # mnist-dit, three seeds: about 8 CPU minutes
    python benchmarks/ecodiff.py --network digits-diffusion --methods random group-magnitude ecodiff
    python benchmarks/ecodiff.py --smoke      # a few steps: does it run

80 % of the heads and of the neurons stay, without repair. Printed: how many of 200 drawings (50 guided steps, or 20) are the digit
that was asked for, their distance from the dense model's drawings of the same noise (mean squared error), and the memory of a
training step through 32 steps of the sampler over that through 4.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from rows import spread
from torch import nn

import secateur
from secateur.gates import HardConcrete, place
from secateur.graph import trace
from secateur.measure.cost import _Live
from secateur.surgery import cut_units
from secateur.tasks import digits_diffusion, load_task, mnist_dit
from secateur.training.sampling import draw, sample
from secateur.training.task import Task

NETWORKS: dict[str, Any] = {"mnist-dit": mnist_dit, "digits-diffusion": digits_diffusion}
METHODS = ("random", "group-magnitude", "ecodiff", "ecodiff, per step")


def cut(task: Task, method: str, seed: int, args: argparse.Namespace) -> nn.Module:
    """The network that a method leaves."""
    if method.startswith("ecodiff"):
        return secateur.train_prune(
            task,
            method="ecodiff",
            target=args.target,
            steps=args.steps,
            samples=args.samples,
            seed=seed,
            match="step" if "step" in method else "final",
        ).model
    model = task.pretrained()
    if method == "group-magnitude":
        pruned = secateur.prune(
            model, task.inputs, method=method, target=args.target, kinds=("heads", "neurons"), inplace=True
        )
        return pruned.model
    graph = trace(model, task.inputs)
    generator = torch.Generator().manual_seed(seed)
    share = float(args.target.rstrip("%")) / 100
    keep = {
        group.name: torch.randperm(group.size, generator=generator)[: int(share * group.size)].sort().values
        for group in graph.prunable(("heads", "neurons"))
    }
    cut_units(model, graph, keep)
    return model


def memory(steps: int, task: Task, sampler: Any) -> int:
    """Peak bytes of tensors alive in a forward and backward of the gates through so many steps."""
    gated = place(
        task.pretrained(),
        trace(task.pretrained(), task.inputs),
        lambda g: HardConcrete(g.size),
        ("heads", "neurons"),
    )
    for parameter in gated.model.parameters():
        parameter.requires_grad_(False)
    own = sampler(steps)
    noise, asked = own.start(4, 0)
    with _Live(set()) as live:
        (sample(gated, own, noise, asked) ** 2).mean().backward()
    return live.peak


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--network", default="mnist-dit", choices=tuple(NETWORKS))
    parser.add_argument("--target", default="80%")
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=METHODS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60, help="of the gates")
    parser.add_argument("--samples", type=int, default=40)
    parser.add_argument(
        "--sampler-steps", type=int, default=10, help="in training; drawings are judged after 50, or 20"
    )
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    if args.smoke:
        args.seeds, args.steps, args.samples, args.sampler_steps, args.count = 1, 2, 4, 2, 10
    torch.set_num_threads(args.threads)
    own = NETWORKS[args.network]
    consistency, sampler, first = own.consistency, own.sampler, own.SEEDS["test"]
    task = dataclasses.replace(load_task(args.network), sampler=sampler(args.sampler_steps))
    dense = own.load_network()
    before, _ = draw(dense, sampler(), args.count, first)
    print(f"dense: {consistency(dense, args.count):.1%} of {args.count} drawings are what was asked for")
    found: list[dict[str, Any]] = []
    for seed in range(args.seeds):
        for method in args.methods:
            if method == "group-magnitude" and seed:
                continue
            started = time.process_time()
            model = cut(task, method, seed, args).eval()
            after, _ = draw(model, sampler(), args.count, first)
            row = {
                "method": method,
                "seed": seed,
                "asked": consistency(copy.deepcopy(model), args.count),
                "distance": ((after - before) ** 2).mean().item(),
                "params": sum(p.numel() for p in model.parameters())
                / sum(p.numel() for p in dense.parameters()),
                "cpu_seconds": time.process_time() - started,
            }
            found.append(row)
            print(json.dumps(row), flush=True)
            if args.json:
                args.json.write_text(json.dumps(found, indent=1))
    print(f"\n{'method':20s} {'asked':>7s} {'± 2 s.e.':>9s} {'distance':>9s} {'params':>7s}")
    for method in args.methods:
        rows = [row for row in found if row["method"] == method]
        asked = [row["asked"] for row in rows]
        right, error = spread(asked)
        distance, params = (statistics.mean(row[key] for row in rows) for key in ("distance", "params"))
        print(f"{method:20s} {right:7.1%} {error:9.1%} {distance:9.4f} {params:7.1%}")
    print(f"\nmemory through 32 steps over 4: {memory(32, task, sampler) / memory(4, task, sampler):.2f}")


if __name__ == "__main__":
    main()
