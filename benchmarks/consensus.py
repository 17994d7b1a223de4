"""Consensus sub-network against random blocks and grouped magnitude, with equal training, at equal multiply-adds.

    python benchmarks/consensus.py                                             # digits, three seeds: about 8 CPU minutes
    python benchmarks/consensus.py --networks resnet20 --epochs 2 --train 10000 --test 2000
    python benchmarks/consensus.py --smoke                                     # a few steps: does it run

Every row begins with the same trained network and trains for `--epochs` with the same rates, data and order.

  consensus        gates with polarisation; cut after the training, nothing after it
  dynamic          the same without polarisation: inputs need not agree
  random-blocks    blocks drawn by chance leave, then the training
  group-magnitude  channels of smallest norm leave, then the training

Printed: accuracy of the gated network, disagreement, accuracy at the end, multiply-adds and parameters that are left.
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

import secateur
from secateur.methods.consensus_subnetwork import ConsensusSubnetwork
from secateur.pruning.plan import Plan
from secateur.tasks import load_task
from secateur.taxonomy import record
from secateur.training.job import Job
from secateur.training.method import TrainMethod

METHODS = ("consensus", "dynamic", "random-blocks", "group-magnitude")


@dataclasses.dataclass
class Rival(TrainMethod):
    """Cut the trained network, then train it."""

    by: str = "norm"

    name: ClassVar[str] = "rival"
    starts: ClassVar[str] = "trained"
    removes: ClassVar[str] = "units"
    share_of: ClassVar[str] = "units"
    info = record("group-magnitude")

    def prune(self, job: Job) -> Plan:
        context = job.context()
        kind = "layers" if self.by == "random" else "channels"
        groups = [group for group in context.groups if group.kind == kind]
        sizes = {name: p.detach() ** 2 for name, p in job.model.named_parameters()}
        if self.by == "random":
            scores = {g.name: torch.rand(g.size, generator=job.generator(g.name)) for g in groups}
            job.cut(context.allocate(scores, "global"))
        else:
            job.cut(context.allocate({g.name: g.reduce(sizes, "mean") for g in groups}, "uniform"))
        job.train("tune")
        return job.plan()


def one(network: str, method: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """A run: its figures."""
    started = time.process_time()
    task = load_task(network, train=args.train, test=args.test)
    chosen: TrainMethod = (
        ConsensusSubnetwork(
            lambda_p=args.lambda_p * (method == "consensus"), lambda_s=args.lambda_s, gate_lr=args.gate_lr
        )
        if method in ("consensus", "dynamic")
        else Rival("random" if method == "random-blocks" else "norm")
    )
    pruned = secateur.train_prune(
        task,
        method=chosen,
        target=args.target,
        epochs=args.epochs,
        seed=seed,
        optimizer="sgd",
        nesterov=True,
        clip=0.0,
        lr=args.lr,
        batch=args.batch,
    )
    report, row = pruned.report, pruned.report["phases"][0]
    return {
        "network": network,
        "method": method,
        "seed": seed,
        "before": report["before"]["quality"],
        "gated": row.get("quality_of_the_gated"),
        "disagreement": row.get("disagreement"),
        "consensus": row.get("share_of_the_consensus"),
        "end": report["after"]["quality"],
        "macs": report["after"]["macs"] / report["before"]["macs"],
        "params": report["after"]["params"] / report["before"]["params"],
        "cpu_seconds": time.process_time() - started,
    }


def table(found: list[dict[str, Any]]) -> None:
    """One row a method: means over seeds, and two standard errors of the last column."""
    for network in dict.fromkeys(row["network"] for row in found):
        before = next(row["before"] for row in found if row["network"] == network)
        print(f"\n{network}: {before:.2%} before")
        print(
            f"{'method':16s} {'gated':>8s} {'disagree':>9s} {'end':>8s} {'± 2 s.e.':>9s} {'MACs':>6s} {'params':>7s}"
        )
        for method in METHODS:
            rows = [row for row in found if (row["network"], row["method"]) == (network, method)]
            if not rows:
                continue
            ends = [row["end"] for row in rows]
            end, error = spread(ends)
            means = {
                k: statistics.mean(row[k] or 0.0 for row in rows)
                for k in ("gated", "disagreement", "macs", "params")
            }
            print(
                f"{method:16s} {means['gated']:8.2%} {means['disagreement']:9.2%} {end:8.2%} {error:9.2%}"
                f" {means['macs']:6.1%} {means['params']:7.1%}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", nargs="*", default=["digits:digits-resnet"])
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=METHODS)
    parser.add_argument("--target", default="macs<=60%")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=float, default=8)
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--gate-lr", type=float, default=1.0, help="of the gates, in rates of the network")
    parser.add_argument("--lambda-p", type=float, default=2.0)
    parser.add_argument("--lambda-s", type=float, default=4.0)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--train", type=int)
    parser.add_argument("--test", type=int)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    if args.smoke:
        args.seeds, args.train, args.test, args.epochs = 1, 128, 50, 1
    torch.set_num_threads(args.threads)
    found: list[dict[str, Any]] = []
    for network in args.networks:
        for seed in range(args.seeds):
            for method in args.methods:
                keep(found, one(network, method, seed, args), args.json)
    table(found)


if __name__ == "__main__":
    main()
