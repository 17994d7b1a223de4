"""Perplexity of SmolLM2 after every method, with the same calibration tokens for all, against random in the same run.

    python benchmarks/llm_quality.py                      # the two tables of docs/results.md
    python benchmarks/llm_quality.py --only wanda magnitude --windows 64

Calibration: 32 windows of 512 tokens of Middlemarch (Brown with --data brown); evaluation: WikiText-2 valid, in
bfloat16 (three times as fast where the processor has it; --float32 for full precision).
Needs SECATEUR_DATA. One row per method: perplexity, its ratio to the dense model's, and seconds.
"""

from __future__ import annotations

import argparse
import copy
import json
import time

import torch

import secateur
from secateur.data.text import encode, load_calibration, load_text
from secateur.measure import perplexity
from secateur.tasks import load_model

WEIGHTS = ["random", "magnitude", "wanda", "ria", "owl", "sparsegpt"]
UNITS = ["random-structured", "group-magnitude", "taylor", "flap", "shortgpt", "nirvana", "tyr"]
EXTRA = {"group-magnitude": {"kinds": ("kv_groups", "neurons")}}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--data", default="middlemarch")
    parser.add_argument(
        "--windows", type=int, default=None, help="evaluate on so many windows of 512 (default: all)"
    )
    parser.add_argument("--weights", default="50%", help="target of the unstructured methods")
    parser.add_argument("--units", default="80%", help="target of the structured methods")
    parser.add_argument("--only", nargs="*", default=None)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--float32", action="store_true", help="evaluate in float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", default=None, help="also write the rows to this file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model, tokenizer = load_model(args.model)
    ids = load_calibration(model, tokenizer, args.data, 32, 512, args.seed)
    text = encode(tokenizer, load_text("wikitext2"))

    def evaluate(network: torch.nn.Module) -> float:
        network = copy.deepcopy(network)
        return perplexity(network if args.float32 else network.bfloat16(), text, 512, limit=args.windows)

    dense = evaluate(model)
    rows = [{"method": "dense", "target": "100%", "perplexity": dense, "ratio": 1.0, "seconds": 0.0}]
    print(f"{'method':20s} {'target':>7s} {'perplexity':>11s} {'x dense':>8s} {'seconds':>8s} {'kept':>7s}")
    print(f"{'dense':20s} {'100%':>7s} {dense:11.2f} {1.0:8.2f}")
    for names, target in ((WEIGHTS, args.weights), (UNITS, args.units)):
        for name in names:
            if args.only and name not in args.only:
                continue
            start = time.perf_counter()
            settings = {"data": ids, "seed": args.seed, "prove": False, **EXTRA.get(name, {})}
            pruned = secateur.prune(model, method=name, target=target, **settings)
            seconds = time.perf_counter() - start
            value = evaluate(pruned.model)
            report = pruned.report
            kept = report["after"]["params_nonzero"] / report["before"]["params"]
            rows.append(
                {
                    "method": name,
                    "target": target,
                    "perplexity": value,
                    "ratio": value / dense,
                    "seconds": seconds,
                }
            )
            print(
                f"{name:20s} {target:>7s} {value:11.2f} {value / dense:8.2f} {seconds:8.1f} {kept:7.1%}",
                flush=True,
            )
    if args.json:
        with open(args.json, "w") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
