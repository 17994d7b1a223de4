"""What training brings back after magnitude pruning: smollm2, perplexity on the second half of WikiText-2's valid split.

    python benchmarks/recovery.py --steps 40 --batch 2 --how lora full

It trains on windows of the first half. Needs SECATEUR_DATA for the text. One row per way, as JSON lines.
"""

import argparse
import copy
import json
import time

import torch

import secateur
from secateur.data.text import calibration, encode, load_text
from secateur.measure import perplexity
from secateur.tasks import load_model


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--how", nargs="+", default=["lora", "full"], choices=["lora", "full"])
    parser.add_argument("--target", default="50%")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--windows", type=int, default=16, help="evaluation windows of 256 tokens")
    parser.add_argument("--distill", type=float, nargs="+", default=[0.5], help="0 trains on the text alone")
    parser.add_argument("--lr", type=float, default=None)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()

    dense, tokenizer = load_model("smollm2", device=args.device)
    text = load_text("wikitext2")
    half = len(text) // 2
    train = calibration(tokenizer, text[:half], samples=args.steps * args.batch, seqlen=args.length)
    held_out = encode(tokenizer, text[half:])[: args.windows * 256]

    def quality(model: torch.nn.Module) -> float:
        return perplexity(model, held_out, seqlen=256)

    pruned = secateur.prune(dense, method="magnitude", target=args.target)
    print(json.dumps({"model": "dense", "perplexity": quality(dense)}), flush=True)
    print(json.dumps({"model": f"magnitude {args.target}", "perplexity": quality(pruned.model)}), flush=True)
    for how in args.how:
        for distill in args.distill:
            model = copy.deepcopy(pruned.model)
            started = time.perf_counter()
            losses = secateur.recover(
                model,
                train,
                how=how,
                steps=args.steps,
                batch=args.batch,
                lr=args.lr,
                teacher=dense if distill else None,
                distill=distill,
                masks=pruned.plan.masks,
            )
            seconds = time.perf_counter() - started
            zeros = all(not model.get_parameter(n)[~m].any() for n, m in pruned.plan.masks.items())
            row = {
                "model": f"{how}, {args.steps} steps of {args.batch} x {args.length}, distill {distill}",
                "perplexity": quality(model),
                "loss": [losses[0], losses[-1]],
                "seconds": round(seconds),
                "zeros_kept": zeros,
            }
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
