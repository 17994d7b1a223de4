"""What corruptions do to the geometry of a dense and of pruned classifiers, and how our corruptions compare with the originals.

    python benchmarks/robustness.py                      # digits; half a minute of one core
    python benchmarks/robustness.py --library            # against imagecorruptions-imaug (pip install it), eight pictures of ImageNet

Printed: accuracy and mean margin by severity, over the fifteen corruptions; for each corruption at severity 5, the clean margin of
the pictures that flip and of those that hold, and how often one that flips has the smaller margin (50 %: it tells nothing); how
far two seeds of a method are apart at 10 % of the weights, and two methods. With --library, by how much each moves a pixel (root mean
square, of 1), ours over theirs at severities 1, 3 and 5: 1 is alike.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from torch import Tensor

import secateur
from secateur.comparison.geometry import Lens
from secateur.comparison.networks import calibration
from secateur.data.corruptions import SEVERITIES, common, corrupt
from secateur.data.pictures import load_pictures
from secateur.measure.geometry import distances, of_model
from secateur.tasks import load_task

METHODS, SEEDS, LEFT = ("wanda", "sparsegpt", "random", "magnitude"), (0, 1, 2), "params<=10%"


def flips(clean: Tensor, flipped: Tensor, held: Tensor) -> str:
    """Mean clean margins of both, and how often one that flips has the smaller one."""
    if not flipped.any() or not held.any():
        return f"{int(flipped.sum()):6d}"
    smaller = (clean[flipped][:, None] < clean[held]).double().mean()
    return f"{int(flipped.sum()):6d}{clean[flipped].mean():10.2f}{clean[held].mean():10.2f}{smaller:10.0%}"


def digits(count: int) -> None:
    task = load_task("digits")
    assert task.pictures is not None and task.pretrained is not None
    shown, dense = task.pictures(count), task.pretrained()
    cloud = Lens(shown, common(1), dense).look(dense)
    print(f"digits, {count} pictures, dense, over 15 corruptions")
    for severity in SEVERITIES:
        which = [k for k, (_, strength) in enumerate(cloud.conditions) if strength == severity]
        accuracy, margin = cloud.right[which].double().mean(), cloud.metrics[which, 2].mean()
        print(f"severity {severity}: accuracy {accuracy:.1%}, mean margin {margin:.2f}")
    print(f"\n{'severity 5':20s}{'flip':>6s}{'margin':>10s}{'of others':>10s}{'smaller':>10s}")
    for k, (name, severity) in enumerate(cloud.conditions):
        if severity == 5:
            flipped = cloud.right[0] & ~cloud.right[k]
            print(f"{name:20s}" + flips(cloud.metrics[0, 2], flipped, cloud.right[0] & cloud.right[k]))
    seen = {}
    for method in METHODS:
        for seed in SEEDS if method != "magnitude" else (0,):
            data = calibration(task, dense, 128, seed)
            cut = secateur.prune(
                task.pretrained(), task.inputs, method=method, target=LEFT, data=data, seed=seed
            )
            seen[method, seed] = of_model(cut.model, shown.ready(shown.pixels), shown.labels)
    apart, names = distances(list(seen.values())), [method for method, _ in seen]
    print(f"\ndistances at {LEFT}, mean over pairs of seeds {SEEDS}")
    print(f"{'':12s}" + "".join(f"{name:>12s}" for name in METHODS))
    for one in METHODS:
        cells = []
        for other in METHODS:
            pairs = [
                apart[i, j]
                for i in range(len(names))
                for j in range(len(names))
                if i != j and (names[i], names[j]) == (one, other)
            ]
            cells.append(f"{np.mean(pairs):12.1f}" if pairs else f"{'-':>12s}")
        print(f"{one:12s}" + "".join(cells))


def library(count: int) -> None:
    from imagecorruptions import corrupt as theirs

    pixels = load_pictures("imagenet-sample", count)[0] * 0.5 + 0.5
    bytes_ = (pixels.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    print(f"ours over theirs, {count} pictures of 224 x 224")
    for name in common(extra=True):
        cells = []
        for severity in (1, 3, 5):
            ours = (corrupt(pixels.clamp(0, 1), name, severity) - pixels).square().mean().sqrt().item()
            np.random.seed(0)
            made = np.stack([theirs(one, corruption_name=name, severity=severity) for one in bytes_])
            other = ((made.astype(float) - bytes_) / 255).std() ** 2 + (
                (made.astype(float) - bytes_) / 255
            ).mean() ** 2
            cells.append(f"{ours / other**0.5:8.2f}")
        print(f"{name:20s}" + "".join(cells), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pictures", type=int, default=200)
    parser.add_argument("--library", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.library:
        library(8)
    else:
        digits(args.pictures)


if __name__ == "__main__":
    main()
