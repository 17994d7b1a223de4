"""What pooled keys are worth over dropped ones: SmolLM2's own queries and keys at 2,048 tokens, then its perplexity and its time.

    OMP_NUM_THREADS=1 python benchmarks/attention.py [--tokens 2048] [--windows 2] [--densities 25,15] [--parts error,quality]
    OMP_NUM_THREADS=1 python benchmarks/attention.py --parts layer,prefill --tokens 4096 --densities 15
    OMP_NUM_THREADS=1 python benchmarks/attention.py --model scenes --block 8    # the vision towers of scenes:llava

error: squared error of each layer's output over its own square, mean over the layers. quality: perplexity of windows of WikiText-2.
layer: processor seconds of one layer's attention, everything included, beside dense SDPA. prefill: of the whole model, in turn. pyramid: psa; binary: the same blocks read whole or not at all
(level 1 alone); random: psa's levels for blocks drawn at random. Their measured densities are made equal on the first layer. The
block on the diagonal and the first one are always read whole; blocks have `--block` tokens.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import secateur
from secateur.attention.layout import Layout
from secateur.attention.levels import density
from secateur.attention.pyramid import gathered
from secateur.attention.reach import Call, Watch
from secateur.data.text import encode, load_text
from secateur.measure import perplexity
from secateur.methods.psa import PSA
from secateur.tasks import load_model
from secateur.tasks.scenes.draw import draw_scenes, render
from secateur.tasks.scenes.models import load_scenes, pixels


@dataclass
class Random(PSA):
    """psa with importance that is drawn."""

    def importance(self, q: Tensor, k: Tensor, layout: Layout, generator: torch.Generator) -> Tensor:
        return torch.rand(*q.shape[:2], layout.rows, layout.columns, generator=generator)


KINDS: dict[str, tuple[type[PSA], dict[str, Any]]] = {
    "pyramid": (PSA, {}),
    "binary": (PSA, {"ends": (0.5, 0.5, 0.5, 0.5)}),
    "random": (Random, {}),
}


def levels_of(method: PSA, call: Call, layout: Layout) -> Tensor:
    return method.levels(call.q, call.k, layout, torch.Generator().manual_seed(0))


def fitted(kind: str, block: int, wanted: float, call: Call) -> PSA:
    """The method of this kind whose measured density on one attention is nearest to the one wanted from below."""
    cls, settings = KINDS[kind]
    layout = Layout(call.q.shape[2], call.k.shape[2], block, block, causal=call.causal)
    low, high = 0.01, 1.0
    for _ in range(9):
        middle = (low + high) / 2
        method = cls(**settings, block_q=block, block_k=block, density=middle)
        over = density(levels_of(method, call, layout), layout.visible()) > wanted
        low, high = (low, middle) if over else (middle, high)
    return cls(**settings, block_q=block, block_k=block, density=low)


def attentions(model: nn.Module, ids: Tensor) -> list[Call]:
    """Queries, keys and values of every layer."""
    found: list[Call] = []
    with torch.no_grad(), Watch(lambda call: found.append(call)) as _:
        model(ids, use_cache=False, logits_to_keep=1)
    return found


def towers(pictures: int = 16) -> list[Call]:
    """Queries, keys and values of the layers of three vision towers on scenes drawn for them: 64 patches and CLS."""
    found: list[Call] = []
    make = torch.Generator().manual_seed(0)
    drawn, _ = render(draw_scenes(pictures, make), make)
    for seed in range(3):
        tower = load_scenes("llava", seed).model.vision_tower
        with torch.no_grad(), Watch(lambda call: found.append(call)) as _:
            tower(pixels(drawn, "llava"))
    return found


def errors(calls: list[Call], methods: dict[str, PSA]) -> dict[str, tuple[float, float]]:
    """(error, measured density) of each method, means over the layers."""
    rows: dict[str, list[tuple[float, float]]] = {name: [] for name in methods}
    for call in calls:
        dense = nn.functional.scaled_dot_product_attention(
            call.q, call.k, call.v, is_causal=call.causal, scale=call.scale, enable_gqa=True
        )
        for name, method in methods.items():
            layout = Layout(call.q.shape[2], call.k.shape[2], method.block_q, method.block_k, call.causal)
            levels = levels_of(method, call, layout)
            out = gathered(call.q, call.k, call.v, levels, layout, scale=call.scale)
            share = float((out - dense).square().sum() / dense.square().sum())
            rows[name].append((share, density(levels, layout.visible())))
    return {name: tuple(map(statistics.mean, zip(*found, strict=True))) for name, found in rows.items()}  # type: ignore[misc]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=("smollm2", "scenes"), default="smollm2")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--windows", type=int, default=2)
    parser.add_argument("--densities", default="25,15")
    parser.add_argument("--block", type=int, default=64)
    parser.add_argument("--parts", default="error,quality")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    parts = args.parts.split(",")
    if args.model == "scenes":
        calls, parts, args.tokens = towers(), ["error"], 65
    else:
        model, tokenizer = load_model("smollm2")
        text = encode(tokenizer, load_text("wikitext2"))
        ids = text.flatten()[: args.tokens][None]
        calls = attentions(model, ids)
    for wanted in (int(share) / 100 for share in args.densities.split(",")):
        methods = {name: fitted(name, args.block, wanted, calls[0]) for name in KINDS}
        print(f"\n{args.tokens} tokens, blocks of {args.block}, density {wanted:.0%}", flush=True)
        if "error" in parts:
            found = errors(calls, methods)
            for name, (error, dense) in found.items():
                ratio = error / found["binary"][0]
                print(
                    f"| {name} | density {dense:.3f} | error {error:.4f} | {ratio:.2f} of binary |",
                    flush=True,
                )
        if "quality" in parts:
            plain = perplexity(copy.deepcopy(model), text, args.tokens, limit=args.windows)
            print(f"| dense | perplexity {plain:.2f} |", flush=True)
            for name, method in methods.items():
                with secateur.attach(model, method) as attached:
                    worse = perplexity(model, text, args.tokens, limit=args.windows)
                shown = attached.report["density"]
                print(f"| {name} | density {shown:.3f} | perplexity {worse:.2f} |", flush=True)
        if "prefill" in parts:
            ratios, levels = [], []
            for _ in range(args.rounds):
                dense = prefill(model, ids)
                with secateur.attach(model, methods["pyramid"]) as attached:
                    ratios.append(prefill(model, ids) / dense)
                spent = attached.report["seconds"]
                levels.append(spent["levels"] / sum(spent.values()))
            print(
                f"| prefill over dense | {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) |"
            )
            print(f"| levels' share of the attention's time | {statistics.median(levels):.2f} |")
        if "layer" in parts:
            once = [attention_time(calls[len(calls) // 2], methods["pyramid"]) for _ in range(args.rounds)]
            quotients = sorted(dense / (levels + keys) for dense, levels, keys in once)
            share = statistics.median(levels / (levels + keys) for _, levels, keys in once)
            print(
                f"| one layer's attention, dense over psa | {statistics.median(quotients):.2f} "
                f"({quotients[0]:.2f} to {quotients[-1]:.2f}) | levels' share {share:.2f} |",
                flush=True,
            )


def prefill(model: nn.Module, ids: Tensor) -> float:
    with torch.no_grad():
        begun = time.process_time()
        model(ids, use_cache=False, logits_to_keep=1)
        return time.process_time() - begun


def attention_time(call: Call, method: PSA) -> tuple[float, float, float]:
    """Processor seconds of one attention: dense; levels; and attention with them."""
    layout = Layout(call.q.shape[2], call.k.shape[2], method.block_q, method.block_k, causal=True)
    at = [time.process_time()]
    nn.functional.scaled_dot_product_attention(
        call.q, call.k, call.v, is_causal=True, scale=call.scale, enable_gqa=True
    )
    at.append(time.process_time())
    levels = levels_of(method, call, layout)
    at.append(time.process_time())
    gathered(call.q, call.k, call.v, levels, layout, scale=call.scale)
    at.append(time.process_time())
    dense, chosen, read = (b - a for a, b in itertools.pairwise(at))
    return dense, chosen, read


if __name__ == "__main__":
    main()
