"""Measured prefill speed-up of structured cuts against the ratio of multiply-adds, dense and pruned in turn.

    python benchmarks/structured_speed.py                 # SmolLM2, 75% and 50%, batch 8 x 128 tokens, 2 threads

Prints, per target, MACs ratio, measured speed-up (median and middle half of interleaved pairs) and their quotient.
"""

from __future__ import annotations

import argparse

import torch

import secateur
from secateur.measure import in_turn, macs
from secateur.tasks import load_model
from secateur.utils.spread import Speed


def prefill(model: torch.nn.Module, ids: torch.Tensor) -> None:
    with torch.inference_mode():
        model(ids, use_cache=False)


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
    print(f"{'target':>7s} {'MACs ratio':>11s} {'quotient':>9s}   speed-up, and the middle half of the pairs")
    for target in args.targets:
        pruned = secateur.prune(
            dense, method="random-structured", target=target, round_to=args.round_to, prove=False
        ).model
        calls = [lambda model=model: prefill(model, ids) for model in (dense, pruned)]
        speed = Speed.of(*in_turn(calls, args.rounds))
        inputs = {"input_ids": ids}
        expected = macs(dense, inputs) / macs(pruned, inputs)
        print(f"{target:>7s} {expected:11.2f} {speed.ratio / expected:9.2f}   {speed}", flush=True)


if __name__ == "__main__":
    main()
