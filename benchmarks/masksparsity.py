"""MaskSparsity against L1 and BatchNorm-scale pruning at half of the multiply-adds, with equal training, on CIFAR-10.

    python benchmarks/masksparsity.py --device cuda --jobs 8          # ResNet-20, three seeds
    python benchmarks/masksparsity.py --device cuda --jobs 8 --networks resnet56
    python benchmarks/masksparsity.py --smoke                         # a few steps on a CPU: does it run

Every rival begins with the same trained network, trains for `--epochs`, is cut to `--target` and fine-tuned for
`--tune-epochs`, with the same data in the same order, rates and batches. They differ in the penalty and in what leaves:

  l1               no penalty; the filters of smallest L1 norm leave, the same share of every group
  slimming         L1 on all BatchNorm scales; the smallest scales leave, the same share of every group
  slimming-global  the same; the smallest scales of all groups leave
  masksparsity     L1 on the scales of the channels that were chosen before; these leave, the same share of every group
  random           no penalty; channels drawn by chance leave, the same share of every group
  l1-direct        as l1, but cut at once and fine-tuned: without the training between (less training than the others)

Printed: test accuracy before, after the training, right after the cut, and at the end.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import statistics
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import ClassVar

import torch
from rows import spread

import secateur
from secateur.methods.masksparsity import MaskSparsity
from secateur.pruning.plan import Plan
from secateur.tasks import load_task
from secateur.taxonomy import record
from secateur.training.job import Job
from secateur.training.method import TrainMethod
from secateur.training.scales import Sparsify, batchnorm_scales, coupled_scales, gammas
from secateur.training.task import Task

METHODS = ("random", "l1-direct", "l1", "slimming", "slimming-global", "masksparsity")
tasks: dict[str, Task] = {}


@dataclasses.dataclass
class Rival(TrainMethod):
    """Train with a penalty on all scales or none, cut by L1 norm or scale, fine-tune."""

    lam: float = 0.0
    by: str = "l1"
    divide: str = "uniform"
    first: bool = True
    tune: float = 0.4
    tune_lr: float = 0.01

    name: ClassVar[str] = "rival"
    starts: ClassVar[str] = "trained"
    removes: ClassVar[str] = "units"
    kinds: ClassVar[tuple[str, ...] | None] = ("channels", "neurons")
    info = record("masksparsity")

    def prune(self, job: Job) -> Plan:
        scales = batchnorm_scales(job.model)
        context = job.context()
        members = coupled_scales(context, scales)
        everything = {name: torch.zeros_like(g, dtype=torch.bool) for name, g in scales.items()}
        if self.first:
            job.train("sparse", after_backward=[Sparsify(scales, everything, self.lam)] if self.lam else ())
        job.note(phase="sparse", quality=job.quality())
        sizes = {name: p.detach().abs() for name, p in job.model.named_parameters()}
        scores = {}
        for name, group in members.items():
            if self.by == "random":
                scores[name] = torch.rand(group.size, generator=job.generator(name))
            elif self.by == "scale":
                scores[name] = gammas(group, scales).mean(0)
            else:
                scores[name] = group.reduce(sizes, roles=("out",))
        job.cut(context.allocate(scores, self.divide))
        job.note(quality_after_the_cut=job.quality())
        job.train("tune", steps=round(self.tune * job.steps), lr=self.tune_lr)
        return job.plan()


def one(network: str, method: str, seed: int, args: argparse.Namespace) -> dict[str, object]:
    """A run: its figures."""
    torch.set_num_threads(args.threads)
    started, task = time.perf_counter(), tasks[network]
    begin = task.pretrained
    task = dataclasses.replace(task, pretrained=lambda: begin().to(memory_format=torch.channels_last))
    if args.device != "cpu":
        task = dataclasses.replace(task, train=tuple(part.to(args.device) for part in task.train))
    own = {"tune": args.tune_epochs / args.epochs, "tune_lr": args.tune_lr}
    if method == "masksparsity":
        chosen: TrainMethod = MaskSparsity(args.lam, mask="uniform", **own)
    elif method.startswith("slimming"):
        chosen = Rival(args.slim_lam, "scale", "global" if method.endswith("global") else "uniform", **own)
    else:
        chosen = Rival(by="random" if method == "random" else "l1", first=method != "l1-direct", **own)
    pruned = secateur.train_prune(
        task,
        method=chosen,
        target=args.target,
        epochs=args.epochs,
        seed=seed,
        device=args.device,
        lr=args.lr,
        batch=args.batch,
        precision=args.precision,
        optimizer="sgd",
        nesterov=True,
        clip=0.0,
        lr_schedule="cosine",
    )
    report, row = pruned.report, pruned.report["phases"][0]
    return {
        "network": network,
        "method": method,
        "seed": seed,
        "before": report["before"]["quality"],
        "trained": row["quality"],
        "cut": row["quality_after_the_cut"],
        "end": report["after"]["quality"],
        "macs": report["after"]["macs"] / report["before"]["macs"],
        "params": report["after"]["params"] / report["before"]["params"],
        **{key: row[key] for key in row if "gamma" in key or key.startswith("leaving")},
        "seconds": time.perf_counter() - started,
    }


def table(found: list[dict]) -> None:
    for network in dict.fromkeys(row["network"] for row in found):
        before = next(row["before"] for row in found if row["network"] == network)
        print(f"\n{network}: {before:.2%} before")
        print(
            f"{'method':16s} {'trained':>8s} {'cut':>8s} {'end':>8s} {'± 2 s.e.':>9s} {'MACs':>6s} {'params':>7s}   by seed"
        )
        for method in METHODS:
            rows = [row for row in found if (row["network"], row["method"]) == (network, method)]
            if not rows:
                continue
            rows.sort(key=lambda row: row["seed"])
            ends = [row["end"] for row in rows]
            error = spread(ends)[1]
            trained, cut, end, macs, params = (
                statistics.mean(row[key] for row in rows)
                for key in ("trained", "cut", "end", "macs", "params")
            )
            each = " ".join(f"{value:.2%}" for value in ends)
            print(
                f"{method:16s} {trained:8.2%} {cut:8.2%} {end:8.2%} {error:9.2%} {macs:6.1%} {params:7.1%}   {each}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", nargs="*", default=["resnet20"])
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=METHODS)
    parser.add_argument("--target", default="macs<=50%")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=float, default=20)
    parser.add_argument("--tune-epochs", type=float, default=8)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--tune-lr", type=float, default=0.01)
    parser.add_argument("--lam", type=float, default=5e-3, help="of masksparsity")
    parser.add_argument("--slim-lam", type=float, default=1e-3, help="of slimming")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument(
        "--precision", default="bfloat16", help="bfloat16 or float32; pictures are judged in float32"
    )
    parser.add_argument("--train", type=int, help="training pictures, at most; default: 35,000")
    parser.add_argument("--test", type=int, help="test pictures, at most; default: 10,000")
    parser.add_argument("--split", choices=("test", "val"), default="test")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=1, help="runs at once")
    parser.add_argument("--json", type=Path, help="where the figures go")
    parser.add_argument("--smoke", action="store_true", help="a few steps of small batches, one seed")
    args = parser.parse_args()
    if args.smoke:
        args.seeds, args.train, args.test, args.batch, args.epochs, args.tune_epochs = 1, 64, 50, 16, 1, 1
    start, found = time.perf_counter(), []
    for network in args.networks:
        tasks[network] = load_task(network, split=args.split, train=args.train, test=args.test)
    runs = [(n, m, seed, args) for n in args.networks for seed in range(args.seeds) for m in args.methods]
    with ProcessPoolExecutor(args.jobs, mp_context=multiprocessing.get_context("fork")) as pool:
        for done in as_completed([pool.submit(one, *run) for run in runs]):
            found.append(done.result())
            print(json.dumps(found[-1]), flush=True)
            if args.json:
                settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
                args.json.write_text(json.dumps({"settings": settings, "found": found}, indent=1))
    table(found)
    print(f"\n{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
