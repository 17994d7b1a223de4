"""SmolLM2 with the tokens that a text uses: parameters, bytes, and the perplexity of that text.

    python benchmarks/vocabulary.py --data wikitext2 --target vocabulary=used
    python benchmarks/vocabulary.py --data tiny_shakespeare --target vocabulary=16000

Three perplexities over the same windows: of the dense model, of the dense model where only the kept tokens compete (its softmax
over their logits), and of the cut one. The last two are the same number when the cut is right. The first is higher: what
it gives to tokens that the text never uses.
"""

from __future__ import annotations

import argparse
import math

import torch

import secateur
from secateur.data.text import encode, load_text
from secateur.tasks import load_model


def mean_loss(model: torch.nn.Module, ids: torch.Tensor, kept: torch.Tensor | None = None) -> float:
    """Mean loss of windows [n, length], in double precision; with `kept`, among these tokens alone."""
    total = 0.0
    place = {} if kept is None else {int(token): n for n, token in enumerate(kept)}
    with torch.no_grad():
        for window in ids:
            logits = model(window[None]).logits[0, :-1]
            wanted = window[1:]
            if kept is not None:
                logits, wanted = logits[:, kept], torch.tensor([place[int(token)] for token in wanted])
            total += float(torch.nn.functional.cross_entropy(logits.double(), wanted))
    return total / len(ids)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--data", default="wikitext2")
    parser.add_argument("--target", default="vocabulary=used")
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--length", type=int, default=256)
    given = parser.parse_args()
    model, tokenizer = load_model(given.model)
    pruned = secateur.prune(
        model, method="token-frequency", target=given.target, data=given.data, tokenizer=tokenizer
    )
    kept = pruned.plan.tokens
    assert kept is not None
    text = load_text(given.data)
    old, new = encode(tokenizer, text), encode(pruned.tokenizer, text)
    print(pruned.report["notes"][-1])
    before, after = pruned.report["before"], pruned.report["after"]
    for key in ("params", "macs", "size_bytes"):
        print(f"{key}: {before[key]:,} -> {after[key]:,} ({after[key] / before[key]:.1%})")
    same = len(old) == len(new) and torch.equal(kept[new], old)
    print(
        f"the text is {len(old):,} tokens before and {len(new):,} after, {'the same' if same else 'not the same'}"
    )
    starts = torch.linspace(0, len(old) - given.length, given.windows).long()
    if not same:
        return
    rows = starts[:, None] + torch.arange(given.length)
    dense, among, cut = mean_loss(model, old[rows]), mean_loss(model, old[rows], kept), mean_loss(pruned.model, new[rows])  # fmt: skip
    print(f"perplexity: dense {math.exp(dense):.4f}, dense among the kept tokens {math.exp(among):.4f}, cut {math.exp(cut):.4f}")  # fmt: skip
    print(f"cut / dense among the kept - 1 = {math.exp(cut - among) - 1:.1e}; cut / dense = {math.exp(cut - dense):.4f}")  # fmt: skip


if __name__ == "__main__":
    main()
