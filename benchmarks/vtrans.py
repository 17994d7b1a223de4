"""VTrans with masks alone and with all weights, against FLAP, Taylor, NIRVANA, Týr and random units, on a language model at equal size.

    python benchmarks/vtrans.py                    # the small model of the tests: about 6 CPU minutes
    python benchmarks/vtrans.py --model smollm2 --target 80% --steps 240 --batch 2 --eval 16 --json rows.json \
        --methods "vtrans, masks alone" flap taylor nirvana tyr random-structured    # an hour of one core
    python benchmarks/vtrans.py --smoke            # does it run

All cut heads and neurons out of the same network to the same size. Training on a text helps on its like whatever leaves, so "trained" rivals
get as many steps of all their weights after the cut. VTrans learns its
masks on `--steps` batches of `--batch` x 128 tokens, drawn from the windows that all others are calibrated on. Printed: perplexity of other text, processor
seconds, and what a step with masks alone costs beside one that trains all weights.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from pathlib import Path
from typing import Any

import torch
from rows import keep

import secateur
from secateur.data.text import encode, load_calibration, load_text
from secateur.measure import perplexity
from secateur.tasks import load_model
from secateur.training import fit

KINDS = ("kv_groups", "neurons")
METHODS = (
    "vtrans, masks alone",
    "vtrans, all weights",
    "flap",
    "flap, trained",
    "taylor",
    "nirvana",
    "tyr",
    "random-structured",
    "random-structured, trained",
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="aidreams")
    parser.add_argument("--data", default="brown")
    parser.add_argument("--target", default="macs<=85%")
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=METHODS)
    parser.add_argument("--samples", type=int, default=256, help="windows of 128 tokens, the same for all")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--kl", type=float, default=1e-4)
    parser.add_argument("--mask-lr", type=float, default=0.1)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--eval", type=int, default=24, help="windows of 256 tokens of WikiText-2 valid")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.smoke:
        args.steps, args.eval, args.batch, args.samples = 3, 2, 2, 16
    model, tokenizer = load_model(args.model)
    text = encode(tokenizer, load_text("wikitext2"))
    score = lambda network: perplexity(network, text, 256, limit=args.eval)
    print(json.dumps({"dense": score(model)}), flush=True)
    rows: list[dict[str, Any]] = []
    for seed in range(args.seeds):
        ids = load_calibration(model, tokenizer, args.data, args.samples, 128, seed)
        for method in args.methods:
            started = time.process_time()
            own = copy.deepcopy(model)
            if method.startswith("vtrans"):
                pruned = secateur.train_prune(
                    own, ids[:1], method="vtrans", target=args.target, data=ids, steps=args.steps, batch=args.batch,
                    optimizer="adamw", lr=1e-4, warmup=0.0, kl=args.kl, mask_lr=args.mask_lr, kinds=KINDS, seed=seed,
                    masks_only="masks" in method,
                )  # fmt: skip
                left = pruned.report["phases"][0]["share_expected"]
            else:
                pruned = secateur.prune(
                    own, ids[:1], method=method.partition(",")[0], target=args.target, data=ids, kinds=KINDS, seed=seed, seqlen=128
                )  # fmt: skip
                left = None
                if "trained" in method:
                    fit(
                        pruned.model,
                        ids,
                        steps=args.steps,
                        batch=args.batch,
                        optimizer="adamw",
                        lr=1e-4,
                        warmup=0.0,
                        seed=seed,
                    )
            seconds = time.process_time() - started
            after, before = pruned.report["after"], pruned.report["before"]
            keep(
                rows,
                {
                    "method": method,
                    "seed": seed,
                    "perplexity": score(pruned.model),
                    "macs": after["macs"] / before["macs"],
                    "params": after["params"] / before["params"],
                    "expected": left,
                    "cpu_seconds": seconds,
                },
                args.json,
            )


if __name__ == "__main__":
    main()
