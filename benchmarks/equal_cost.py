"""Unit methods side by side at one bare percentage, and at equal multiply-adds: quality, and what is left of the model.

    python benchmarks/equal_cost.py                                                       # ResNet-20, a minute of one core
    python benchmarks/equal_cost.py --model smollm2 --targets 'macs<=80%'                 # a minute a method

Equal percent isn't equal size: what a bare share counts is the method's choice (weights of the blocks, or units of each
group), so only rows of one `macs` or `params` target can be compared. Nothing is trained after the cut. Needs SECATEUR_DATA.

- a network for CIFAR-10: accuracy on 1,000 test pictures; 128 training pictures to calibrate on, the same for all.
- a language model: perplexity of 8 windows of 256 tokens of WikiText-2 valid, in bfloat16; 8 windows of 128 tokens of the
  Brown corpus to calibrate on.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import secateur
from secateur.data.text import encode, load_calibration, load_text
from secateur.measure import perplexity
from secateur.tasks import load_model, vision

PICTURES = ["random-structured", "group-magnitude", "spa", "obspa", "lrp-pruning"]
LANGUAGE = ["random-structured", "group-magnitude", "flap", "taylor", "shortgpt", "nirvana"]
Case = tuple[nn.Module, dict[str, Any], Callable[[nn.Module], float], str]


def pictures(name: str, test: int, seed: int) -> Case:
    """(network, settings of `prune`, what measures it, how that is written)."""
    x, y = vision.load_pictures("cifar10", 128, split="train")
    shown = vision.load_pictures("cifar10", test, split="test")
    batches = vision.as_pairs((x, y), 32)
    network = vision.load_network(name)
    return network, {"inputs": x[:1], "data": batches}, lambda model: vision.accuracy(model, *shown), "{:.1%}"


def language(name: str, windows: int, seed: int) -> Case:
    model, tokenizer = load_model(name)
    ids = load_calibration(model, tokenizer, "brown", 8, 128, seed)
    text = encode(tokenizer, load_text("wikitext2"))

    def evaluate(network: nn.Module) -> float:
        return perplexity(copy.deepcopy(network).bfloat16(), text, 256, limit=windows)

    return model, {"data": ids, "seqlen": 128, "prove": False}, evaluate, "{:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--targets", nargs="+", default=["70%", "macs<=70%"])
    parser.add_argument("--only", nargs="+", default=None, help="methods")
    parser.add_argument("--limit", type=int, default=None, help="test pictures, or windows of text")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    seen = args.model in vision.RESNETS
    model, settings, evaluate, form = (
        pictures(args.model, args.limit or 1000, args.seed)
        if seen
        else language(args.model, args.limit or 8, args.seed)
    )
    what = "accuracy" if seen else "perplexity"
    print(
        f"| target | method | parameters left | multiply-adds left | {what} |\n| --- | --- | --- | --- | --- |"
    )
    print(f"| 100% | dense | 100 % | 100 % | {form.format(evaluate(model))} |", flush=True)
    for target in args.targets:
        for name in args.only or (PICTURES if seen else LANGUAGE):
            start = time.process_time()
            own = {"kinds": ("channels",)} if seen and name == "random-structured" else {}
            pruned = secateur.prune(model, method=name, target=target, seed=args.seed, **settings, **own)
            before, after = pruned.report["before"], pruned.report["after"]
            left = [f"{after[key] / before[key]:.1%}" for key in ("params", "macs")]
            print(
                f"| {target} | {name} | {left[0]} | {left[1]} | {form.format(evaluate(pruned.model))} |",
                flush=True,
            )
            print(f"{name}: {time.process_time() - start:.0f} s of processor", file=sys.stderr)


if __name__ == "__main__":
    main()
