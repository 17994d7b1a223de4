"""Perplexity of SmolLM2 with the sparsity spread evenly against the spread that Tyr's search finds.

    python benchmarks/tyr_distribution.py                      # 80%, 32 x 512 tokens; about 15 minutes on two idle cores
    python benchmarks/tyr_distribution.py --samples 8 --set rounds=2 generations=4

Calibrates on the Brown corpus, measures on WikiText-2. Rows: dense; Taylor, alike in all layers; Tyr alike in all
layers; Tyr even (layers as alike as the exact budget per kind lets them); Tyr searched. "deleted" has the same units
out without the refit. "seconds" are of the CPU, over all threads.
"""

from __future__ import annotations

import argparse
import copy
import time

import torch
from torch import nn

import secateur
from secateur.data.text import encode, load_calibration, load_text
from secateur.tasks import load_model


@torch.inference_mode()
def perplexity(model: nn.Module, windows: torch.Tensor) -> float:
    total = 0.0
    for batch in windows.split(4):
        logits = model(batch, use_cache=False).logits[:, :-1].float()
        total += float(
            nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum")
        )
    return float(torch.tensor(total / windows[:, 1:].numel()).exp())


def row(name: str, refitted: float, deleted: float | None, seconds: float, params: int) -> None:
    plain = "" if deleted is None else f"{deleted:9.2f}"
    print(f"{name:16s} {refitted:9.2f} {plain:>9s} {params / 1e6:8.2f} {seconds:8.0f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", default="80%")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--windows", type=int, default=24, help="of 512 tokens, to measure on")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", default=["taylor", "alike", "even", "searched"])
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="NAME=VALUE", help="hyperparameters of the search"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model, tokenizer = load_model("smollm2")
    data = load_calibration(model, tokenizer, "brown", args.samples, args.seqlen, args.seed)
    text = encode(tokenizer, load_text("wikitext2")[: 4000 * args.windows])
    windows = text[: args.windows * 512].reshape(-1, 512)
    print(f"{'':16s} {'refitted':>9s} {'deleted':>9s} {'M params':>8s} {'seconds':>8s}")
    row("dense", perplexity(model, windows), None, 0, sum(p.numel() for p in model.parameters()))
    runs = {
        "taylor": {"method": "taylor", "uniform": True},
        "alike": {"method": "tyr", "uniform": True},
        "even": {"method": "tyr", "generations": 0},
        "searched": {"method": "tyr", **dict(pair.split("=", 1) for pair in args.set)},
    }
    for name in args.only:
        settings = dict(target=args.target, data=data, seed=args.seed, seqlen=args.seqlen, **runs[name])
        started = time.process_time()
        pruned = secateur.prune(model, **settings)
        seconds = time.process_time() - started
        deleted = None
        if pruned.plan.values:
            plain = copy.deepcopy(pruned.plan)
            plain.values = {}
            other = copy.deepcopy(model)
            secateur.apply_plan(other, plain, graph=pruned.graph)
            deleted = perplexity(other, windows)
        params = sum(p.numel() for p in pruned.model.parameters())
        row(name, perplexity(pruned.model, windows), deleted, seconds, params)
        for note in pruned.plan.notes.values():
            print(f"  {note}")
        if name == "searched":
            for kind in ("kv_groups", "neurons"):
                kept = [group["kept"] for group in pruned.report["groups"] if group["kind"] == kind]
                print(f"  {kind} kept: {' '.join(map(str, kept))}")


if __name__ == "__main__":
    main()
