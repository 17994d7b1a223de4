"""Depth and width of a language model side by side at one cost, before training and after a short distillation.

    python benchmarks/depth.py --out depth.json                                   # a minute or two of one core a method
    python benchmarks/depth.py --only auto 2ssp flap --steps 200 --out distilled.json

SmolLM2; 32 windows of 512 tokens of the Brown corpus to calibrate on, perplexity of 24 windows of 512 tokens of WikiText-2 valid in
bfloat16. Every method meets the same target, in multiply-adds unless said: a bare share counts other things for each. With
`--steps` the cut model is trained as a whole towards the dense model's logits alone (KL at temperature 1, AdamW, 3e-5) on other
windows of Brown, as Minitron does. One row a method and seed, as JSON lines. Needs SECATEUR_DATA.
"""

from __future__ import annotations

import argparse
import copy
import time
from pathlib import Path
from typing import Any

import rows
import torch

import secateur
from secateur.data.text import encode, load_calibration, load_text
from secateur.measure import perplexity
from secateur.tasks import load_model

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "random-structured": ("random-structured", {}),
    "auto": ("auto", {}),
    "nirvana": ("nirvana", {}),
    "shortgpt": ("shortgpt", {}),
    "flap": ("flap", {}),
    "2ssp": ("2ssp", {}),
    "2ssp, neurons alone": ("2ssp", {"attentions": 0}),
    "minitron": ("minitron", {}),
    "minitron, neurons": ("minitron", {"kinds": ("neurons",)}),
    "minitron, depth by influence": ("minitron", {"axis": "depth"}),
    "minitron, depth by loss": ("minitron", {"axis": "depth", "blocks_by": "loss"}),
    "slicegpt": ("slicegpt", {}),
    "slicegpt, raw moments": ("slicegpt", {"moments": "raw"}),
}
"""What is run, by what it is called in the table."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--target", default="macs<=80%")
    parser.add_argument("--only", nargs="*", default=None)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--samples", type=int, default=32, help="calibration windows of 512 tokens")
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--steps", type=int, default=0, help="of distillation, batches of 2 x 256 tokens")
    parser.add_argument("--lr", type=float, default=3e-5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=None, help="also write the rows to this file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model, tokenizer = load_model(args.model)
    text = encode(tokenizer, load_text("wikitext2"))

    def quality(network: torch.nn.Module) -> float:
        return perplexity(copy.deepcopy(network).bfloat16(), text, 512, limit=args.windows)

    found: list[dict[str, Any]] = []
    rows.keep(found, {"method": "dense", "perplexity": round(quality(model), 2)}, args.out)
    for seed in args.seeds:
        ids = load_calibration(model, tokenizer, "brown", args.samples, 512, seed)
        more = load_calibration(model, tokenizer, "brown", max(1, 2 * args.steps), 256, seed + 1000)
        for called in args.only or METHODS:
            name, settings = METHODS[called]
            start = time.process_time()
            pruned = secateur.prune(
                model, method=name, target=args.target, data=ids, seed=seed, prove=False, **settings
            )
            before, after = pruned.report["before"], pruned.report["after"]
            row = {"method": called, "seed": seed, "target": args.target}
            row |= {key: round(after[key] / before[key], 4) for key in ("params", "macs")}
            row |= {
                "perplexity": round(quality(pruned.model), 2),
                "seconds": round(time.process_time() - start),
            }
            if args.steps:
                secateur.recover(
                    pruned.model, more, how="full", steps=args.steps, batch=2, lr=args.lr,
                    teacher=model, distill=1.0, temperature=1.0, seed=seed,
                )  # fmt: skip
                row |= {"steps": args.steps, "distilled": round(quality(pruned.model), 2)}
            rows.keep(found, row, args.out)


if __name__ == "__main__":
    main()
