"""Unit methods side by side at one bare percentage, and at equal multiply-adds: perplexity, and what is left of the model.

    python benchmarks/equal_cost.py                                          # the table of docs/results.md
    python benchmarks/equal_cost.py --targets 'params<=80%' --only flap taylor --windows 32

Equal percent isn't equal size: what a bare share counts is the method's choice (weights of the blocks, or units of every
group), so only rows of one `macs` or `params` target can be compared. Calibration: 8 windows of 128 tokens of the Brown
corpus, the same for all; evaluation: 8 windows of 256 tokens of WikiText-2 valid, in bfloat16. Needs SECATEUR_DATA.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time

import torch

import secateur
from secateur.data.text import encode, load_calibration, load_text
from secateur.measure import perplexity
from secateur.tasks import load_model

METHODS = ["random-structured", "group-magnitude", "obspa", "taylor", "nirvana", "shortgpt", "flap"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--data", default="brown")
    parser.add_argument("--targets", nargs="+", default=["80%", "macs<=80%"])
    parser.add_argument("--only", nargs="+", default=METHODS)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model, tokenizer = load_model(args.model)
    ids = load_calibration(model, tokenizer, args.data, 8, 128, args.seed)
    text = encode(tokenizer, load_text("wikitext2"))

    def evaluate(network: torch.nn.Module) -> float:
        return perplexity(copy.deepcopy(network).bfloat16(), text, 256, limit=args.windows)

    dense = evaluate(model)
    print(f"dense: perplexity {dense:.2f}\n")
    print("| method | target | parameters left | multiply-adds left | perplexity | x dense |")
    print("| --- | --- | --- | --- | --- | --- |")
    for target in args.targets:
        for name in args.only:
            start = time.process_time()
            pruned = secateur.prune(
                model, method=name, target=target, data=ids, seed=args.seed, seqlen=128, prove=False
            )
            before, after = pruned.report["before"], pruned.report["after"]
            left = [f"{after[key] / before[key]:.1%}".replace("%", " %") for key in ("params", "macs")]
            value = evaluate(pruned.model)
            print(
                f"| {name} | {target} | {left[0]} | {left[1]} | {value:.4g} | {value / dense:.3g} |",
                flush=True,
            )
            print(f"{name}: {time.process_time() - start:.0f} s of processor", file=sys.stderr)


if __name__ == "__main__":
    main()
