"""Measured prefill speed-up of structured cuts against the ratio of multiply-adds, dense and pruned in turn.

    python benchmarks/structured_speed.py                 # SmolLM2, 75% and 50%, batch 8 x 128 tokens, 2 threads

Prints, per target, MACs ratio, measured speed-up (median over interleaved rounds) and their quotient.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

import secateur
from secateur.measure import macs
from secateur.tasks import load_model


def seconds(model: torch.nn.Module, ids: torch.Tensor) -> float:
    start = time.perf_counter()
    with torch.inference_mode():
        model(ids, use_cache=False)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--targets", nargs="*", default=["75%", "50%"])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--round-to", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    dense, _ = load_model("smollm2")
    ids = torch.randint(0, dense.config.vocab_size, (args.batch, args.tokens))
    print(f"{'target':>7s} {'MACs ratio':>11s} {'speed-up':>9s} {'quotient':>9s}")
    for target in args.targets:
        pruned = secateur.prune(
            dense, method="random-structured", target=target, round_to=args.round_to, prove=False
        ).model
        seconds(dense, ids), seconds(pruned, ids)
        ratios = [seconds(dense, ids) / seconds(pruned, ids) for _ in range(args.rounds)]
        inputs = {"input_ids": ids}
        expected = macs(dense, inputs) / macs(pruned, inputs)
        measured = statistics.median(ratios)
        print(f"{target:>7s} {expected:11.2f} {measured:9.2f} {measured / expected:9.2f}", flush=True)


if __name__ == "__main__":
    main()
