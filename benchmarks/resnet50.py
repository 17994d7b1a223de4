"""What pruning timm's ResNet-50 costs, and what the cut model gains.

    python benchmarks/resnet50.py                        # all three parts, about two minutes
    python benchmarks/resnet50.py --parts cut trace      # without the speed-up

- cut: seconds to trace, to select (score and divide), to prove and to slice, half of every group.
- trace: seconds to trace at width x1 and x4 (half and twice as well), the forward it contains aside.
- speed: measured speed-up at `round_to=8`, batch 8, against the ratio of multiply-adds. Dense and pruned run in turn
  and every pair gives a ratio, so that other work on the machine hits both; the median counts. By the clock and in
  processor seconds, which include those of waiting threads: the first on an idle machine, the second on a busy one.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import timm
import torch

import secateur
from secateur.measure import in_turn, macs
from secateur.method import make_method
from secateur.pruning.context import Context
from secateur.pruning.method import UnitMethod
from secateur.pruning.target import parse_target
from secateur.surgery import cut_units, prove
from secateur.utils.spread import Speed


def timed(call: Callable[[], Any]) -> tuple[Any, float, float]:
    """(result, seconds by the clock, processor seconds)."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = call()
    return result, time.perf_counter() - wall, time.process_time() - cpu


def forward(model: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model(x)


def cut() -> None:
    model, x = timm.create_model("resnet50").eval(), torch.randn(1, 3, 64, 64)
    secateur.trace(model, x)
    graph, *trace_s = timed(lambda: secateur.trace(model, x))
    method = make_method("group-magnitude")
    assert isinstance(method, UnitMethod)
    context = Context(model, method, parse_target("50%"), x)
    context.graph = graph
    plan, *select_s = timed(lambda: method.plan(context))
    _, *prove_s = timed(lambda: prove(model, graph, plan.keep, x))
    _, *slice_s = timed(lambda: cut_units(model, graph, plan.keep))
    print("half of every group, one thread, a 64 x 64 picture (clock / processor seconds)")
    steps = {"trace": trace_s, "select": select_s, "prove": prove_s, "slice": slice_s}
    steps["select + slice"] = [a + b for a, b in zip(select_s, slice_s)]
    for name, (wall, cpu) in steps.items():
        print(f"{name:>15s} {wall:7.3f} {cpu:7.3f}")


def wide(factor: float) -> torch.nn.Module:
    """ResNet-50 with all channels times `factor`, its weights set without the cost of drawing them."""
    with torch.device("meta"):
        model = timm.create_model(
            "resnet50",
            channels=tuple(int(c * factor) for c in (64, 128, 256, 512)),
            stem_width=int(64 * factor),
        )
    model = model.to_empty(device="cpu").eval()
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.fill_(1) if tensor.dim() < 2 else tensor.fill_(0.001)
    return model


def by_width(factor: float, rounds: int) -> None:
    model, x = wide(factor), torch.randn(1, 3, 64, 64)
    forward(model, x), secateur.trace(model, x)
    pairs = [
        (timed(lambda: secateur.trace(model, x))[2], timed(lambda: forward(model, x))[2])
        for _ in range(rounds)
    ]
    a, b = (statistics.median(p[n] for p in pairs) for n in (0, 1))
    count = sum(p.numel() for p in model.parameters())
    print(f"{factor:>6} {count:12,d} {a:7.3f} {b:8.3f} {a - b:11.3f}", flush=True)


def trace(rounds: int = 5) -> None:
    print("\ntrace by width, one thread, processor seconds, median of", rounds)
    print(f"{'width':>6s} {'parameters':>12s} {'trace':>7s} {'forward':>8s} {'difference':>11s}")
    for factor in (0.5, 1, 2, 4):
        by_width(factor, rounds)


def speed(targets: list[str], batch: int, rounds: int, threads: int) -> None:
    dense, small = timm.create_model("resnet50").eval(), torch.randn(1, 3, 224, 224)
    print(f"\nspeed-up at round_to=8, batch {batch}, {threads} threads, median of {rounds} pairs")
    print(f"{'target':>10s} {'layout':>15s} {'MACs ratio':>11s} {'quotients':>10s}   by the clock, in processor seconds")  # fmt: skip
    for target in targets:
        torch.set_num_threads(1)
        pruned = secateur.prune(
            dense, small, method="group-magnitude", target=target, round_to=8, prove=False
        ).model
        ratio = macs(dense, small) / macs(pruned, small)
        torch.set_num_threads(threads)
        for layout in (torch.contiguous_format, torch.channels_last):
            wall, cpu = speed_up(dense, pruned, batch, rounds, layout)
            name = str(layout).removeprefix("torch.")
            quotients = f"{wall.ratio / ratio:.2f} {cpu.ratio / ratio:.2f}"
            print(f"{target:>10s} {name:>15s} {ratio:11.2f} {quotients:>10s}   {wall}, {cpu}", flush=True)


def speed_up(
    dense: torch.nn.Module, pruned: torch.nn.Module, batch: int, rounds: int, layout: torch.memory_format
) -> tuple[Speed, Speed]:
    """Dense over pruned, by the clock and in processor seconds."""
    models = [copy.deepcopy(m).to(memory_format=layout) for m in (dense, pruned)]
    x = torch.randn(batch, 3, 224, 224).contiguous(memory_format=layout)
    calls = [lambda model=model: forward(model, x) for model in models]
    both = lambda: np.array([time.perf_counter(), time.process_time()])
    first, second = (np.array(seconds) for seconds in in_turn(calls, rounds, clock=both))
    return Speed.of(first[:, 0], second[:, 0]), Speed.of(first[:, 1], second[:, 1])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--parts", nargs="+", choices=("cut", "trace", "speed"), default=["cut", "trace", "speed"]
    )
    parser.add_argument("--targets", nargs="+", default=["macs<=70%", "macs<=50%"])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    if "cut" in args.parts:
        cut()
    if "trace" in args.parts:
        trace()
    if "speed" in args.parts:
        speed(args.targets, args.batch, args.rounds, args.threads)


if __name__ == "__main__":
    main()
