"""OBSPA against plain deletion by L1 norm, without fine-tuning, at 10, 20 and 30 % of the multiply-adds removed.

    python benchmarks/obspa_accuracy.py                          # both networks; prints the table, writes docs/obspa.svg
    python benchmarks/obspa_accuracy.py --networks resnet56 --test 1000

ResNet-56 on CIFAR-10 test pictures, EfficientNet-Lite0 on 250 pictures of the ImageNet sample (which it may have been
trained on: read it as agreement with the dense network). All methods cut the same groups to the same budget with the
same allocation (global: the lowest scores of all groups leave, as in the paper; uniform: the same share of each group); calibration pictures come from the training set, or the other half of the sample. "+ BN" re-estimates
BatchNorm statistics on the calibration pictures, in both methods alike; OBSPA does unless it says "without". "data-free" OBSPA sees uniform noise.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from plot import panels
from torch import Tensor

import secateur
from secateur.methods.obspa import Obspa
from secateur.methods.spa import Spa
from secateur.pruning.context import Context
from secateur.tasks import vision

DATA = {"resnet56": "cifar10", "efficientnet-lite0": "imagenet-sample"}
BATCH = 20
CURVES = {
    "L1": "#b0b7bf",
    "L1 + BN": "#7d8791",
    "OBSPA, data-free": "#e3a857",
    "OBSPA without BN": "#7fb3d5",
    "OBSPA": "#1f6fb2",
}


def shared(cls: type[Spa]) -> type[Spa]:
    """The method, its scores made once for all targets and its repair once for a target."""
    scores: dict[str, Tensor] = {}
    repaired: dict[str, Mapping[str, Tensor]] = {}

    class Shared(cls):  # type: ignore[misc, valid-type]
        def scores(self, context: Context) -> dict[str, Tensor]:
            if not scores:
                scores.update(super().scores(context))
            return scores

        def repair(self, context: Context, keep: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
            target = str(context.target)
            if target not in repaired:
                repaired[target] = super().repair(context, keep)
            return repaired[target]

    return Shared


def curves(
    network: str, targets: list[int], calibration: int, test: int | None, allocation: str
) -> dict[str, dict[int, float]]:
    dense = vision.load_network(network)
    pictures, _ = vision.load_pictures(DATA[network], calibration, split="train")
    x, y = vision.load_pictures(DATA[network], test, split="test")
    batches = list(pictures.split(32))
    start = vision.accuracy(dense, x, y, BATCH)
    print(
        f"\n{network}, {len(x)} test pictures, {len(pictures)} to calibrate on, {allocation} allocation: dense {start:.2%}"
    )
    print(f"{'MACs removed':>14s} " + " ".join(f"{name:>18s}" for name in CURVES), flush=True)
    of_data, of_noise = shared(Obspa), shared(Obspa)
    methods = {
        "L1": Spa(),
        "L1 + BN": Spa(batchnorm="shift"),
        "OBSPA, data-free": of_noise(calibration="noise", noise_samples=calibration),
        "OBSPA without BN": of_data(batchnorm="keep"),
        "OBSPA": of_data(),
    }
    found: dict[str, dict[int, float]] = {name: {0: start} for name in CURVES}
    for target in targets:
        for name, method in methods.items():
            goal = f"macs<={100 - target}%"
            pruned = secateur.prune(
                dense, x[:1], method=method, target=goal, data=batches, allocation=allocation
            )
            found[name][target] = vision.accuracy(pruned.model, x, y, BATCH)
        print(f"{target:13d}% " + " ".join(f"{found[name][target]:18.2%}" for name in CURVES), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", nargs="*", default=list(DATA), choices=list(DATA))
    parser.add_argument(
        "--removed", nargs="*", type=int, default=[10, 20, 30], help="percent of multiply-adds"
    )
    parser.add_argument("--calibration", type=int, default=128, help="calibration pictures")
    parser.add_argument("--test", type=int, default=2000, help="test pictures, at most")
    parser.add_argument("--allocation", nargs="*", default=["global", "uniform"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--plot", type=Path, default=Path(__file__).resolve().parents[1] / "docs" / "obspa.svg"
    )
    parser.add_argument("--json", type=Path, help="where the numbers go; numbers that are there already stay")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    start, found = time.perf_counter(), {}
    if args.json and args.json.exists():
        kept = json.loads(args.json.read_text())
        found = {n: {c: {int(t): v for t, v in d.items()} for c, d in f.items()} for n, f in kept.items()}
    for network in args.networks:
        for allocation in args.allocation:
            name = f"{network} on {DATA[network]}, {allocation}"
            found[name] = curves(network, args.removed, args.calibration, args.test, allocation)
    if args.json:
        args.json.write_text(json.dumps(found))
    args.plot.write_text(panels(found, CURVES, "multiply-adds removed"))
    print(f"\n{time.perf_counter() - start:.0f} s, {args.plot}")


if __name__ == "__main__":
    main()
