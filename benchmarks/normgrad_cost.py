"""What a NormGrad map costs, in forwards and backwards of the same network: processor time, taken in turn.

    python benchmarks/normgrad_cost.py               # ResNet-50, one picture of 224 x 224, one thread

The yardstick is one forward, and one backward from a logit to the weights, as training does; and, harder, one backward to
the picture alone. Random weights: the time doesn't depend on them. Median of the runs.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torchvision
from torch import nn

import secateur


def once(model: nn.Module, x: torch.Tensor, weights: bool) -> None:
    for parameter in model.parameters():
        parameter.requires_grad_(weights)
    score = model(x if weights else x.clone().requires_grad_(True))[0, 3]
    score.backward()
    model.zero_grad(set_to_none=True)


def seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model, x = torchvision.models.resnet50().eval(), torch.randn(1, 3, 224, 224)
    model.fc.weight.data.abs_()  # so that no map is zero everywhere
    work: dict[str, Callable[[], object]] = {
        "forward + backward to the weights": lambda: once(model, x, True),
        "forward + backward to the picture": lambda: once(model, x, False),
        "normgrad, last stage": lambda: secateur.saliency(model, x, "normgrad", 3),
        "normgrad, all stages": lambda: secateur.saliency(model, x, "normgrad", 3, layers="all"),
        "grad-cam": lambda: secateur.saliency(model, x, "grad-cam", 3),
        "gradient": lambda: secateur.saliency(model, x, "gradient", 3),
        "guided-backprop": lambda: secateur.saliency(model, x, "guided-backprop", 3),
        "lrp": lambda: secateur.saliency(model, x, "lrp", 3),
    }
    taken: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(args.runs + 1):
        for name, do in work.items():
            taken[name].append(seconds(do))
    medians = {name: statistics.median(times[1:]) for name, times in taken.items()}
    full, short = list(medians.values())[:2]
    print(f"{'':36s} {'ms':>8s} {'x weights':>10s} {'x picture':>10s}")
    for name, value in medians.items():
        print(f"{name:36s} {value * 1000:8.1f} {value / full:10.2f} {value / short:10.2f}")


if __name__ == "__main__":
    main()
