"""SparseVLM: words that match the picture rate its tokens; what is rated low is dropped, the better part of it merged.

Zhang et al. 2024, "SparseVLM: Visual Token Sparsification for Efficient Vision-Language Model Inference",
https://arxiv.org/abs/2410.04417. There is no sheet: a baseline, read from the authors' code.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor

from secateur.method import register
from secateur.taxonomy import record
from secateur.tokens.method import Facts, Stage, TokenMethod
from secateur.tokens.reduce import density_clusters, first
from secateur.tokens.state import Missing, Reduction, TokenSets

LEFT = ((82, 32, 18), (249, 55, 27), (312, 117, 39), (309, 204, 113), (576, 576, 576))
"""Tokens of 576 after each cut where the release is told to keep 64, 96, 128 and 192, merged ones counted; and all."""


@register
@dataclass
class SparseVLM(TokenMethod):
    """Attention from the rating words after layers 3, 7 and 16 of 32 ranks the tokens; three in ten of the rest are merged.

    >>> with secateur.attach(vlm, "sparsevlm", target="tokens=113") as attached:  # doctest: +SKIP
    ...     vlm.generate(**inputs)

    The target is what is left after the last cut, merged tokens included. The release knows four settings, named after a mean
    over the layers: its 192, 128, 96 and 64 of 576 tokens are `tokens=113`, 39, 27 and 18, with its own numbers at the cuts
    before; other targets lie between them in straight lines (a reconstruction). Words rate that get more than their mean share of
    the softmax of products between the picture's and the text's embeddings after it. Of what a cut drops, the best
    int(0.3 n) + 1 are merged to a tenth as many, by density peaks, and stand behind the tokens that stay; positions are counted anew.

    Differs: the paper sets how many tokens leave by the rank of the attention; the release has fixed numbers, as here. It adds
    noise of 1e-6 to the densities; here the first of equals counts as denser. Its later form (`USE_VERSION=2_0`, SparseVLM+) isn't here.

    The released functions (commit 26a5f48), run beside `attach` on 60 random models and inputs of one picture with the noise in the
    order of the tokens, gave the same numbers at all three cuts and the same logits in 60 of 60; with its own, random noise the logits are the
    same in 29.
    """

    layers: tuple[int, ...] = (3, 7, 16)
    scope: ClassVar[str] = "image"
    positions: ClassVar[str] = "compact"
    newlines: ClassVar[str] = "compete"

    info = record("sparsevlm")

    def stages(self, facts: Facts) -> list[Stage]:
        return [
            Stage(
                f"layer:{cut}",
                partial(self.cut, number, f"layer:{cut - 1}"),
                (f"layer:{cut - 1}", "layer:0:entry"),
            )
            for number, cut in enumerate(facts.spread(self.layers, of=32))
        ]

    def cut(self, number: int, site: str, sets: TokenSets) -> Reduction:
        if "raters" not in sets.noted:
            sets.noted["raters"] = raters(sets)
        scores = sets.attention(site, rows=sets.noted["raters"])
        index, features = [], []
        for i, size in enumerate(sets.count.tolist()):
            left = left_after(number, int(sets.asked[i]), int(sets.total[i]))
            chosen, made = self.reduce(sets.features[i, :size], scores[i, :size], min(size, left))
            index.append(chosen)
            features.append(made)
        pad = torch.nn.utils.rnn.pad_sequence
        return Reduction(pad(index, batch_first=True, padding_value=-1), pad(features, batch_first=True))

    def reduce(self, x: Tensor, scores: Tensor, left: int) -> tuple[Tensor, Tensor]:
        """x [n, D], scores [n] -> the places that are taken, as many as are left, and what comes to stand there."""
        stay = (
            left
            if left == len(x)
            else next(k for k in range(left, 0, -1) if k == 1 or k + merged(len(x) - k) <= left)
        )
        order = first(scores, len(x))
        kept = order[:stay].sort().values
        if stay == left:
            return kept, x[kept]
        best = order[stay : stay + recycled(len(x) - stay)]
        centres, made = density_clusters(x[best], left - stay)
        return torch.cat([kept, best[centres]]), torch.cat([x[kept], made.to(x.dtype)])


def raters(sets: TokenSets) -> Tensor:
    """[S, r] columns of the words that rate, -1 none."""
    image, (words, real) = sets.hidden("layer:0:entry"), sets.text("layer:0:entry")
    if not bool(real.any(1).all()):
        raise Missing("text that could rate the tokens", where="sparsevlm", fix="a prompt with words")
    products = (image.float() @ words.float().mT).masked_fill(~real[:, None], -torch.inf)
    share = (products.softmax(2) * sets.valid[..., None]).sum(1) / sets.count[:, None]
    above = real & (share > share.sum(1, keepdim=True) / real.sum(1, keepdim=True))
    above = torch.where(above.any(1, keepdim=True), above, real)
    return sets.text("columns")[0].masked_fill(~above, -1)


def left_after(number: int, asked: int, total: int) -> int:
    """How many of `total` are left after a cut where `asked` are after the last.

    >>> [left_after(number, 113, 576) for number in range(3)]
    [309, 204, 113]
    """
    if number == 2:
        return asked
    last = 576 * asked / total
    low, high = next(pair for pair in pairwise(((0, 0, 0), *LEFT)) if last <= pair[1][2])
    part = (last - low[2]) / (high[2] - low[2])
    return max(asked, round((low[number] + part * (high[number] - low[number])) * total / 576))


def recycled(dropped: int) -> int:
    """How many of the dropped tokens are merged."""
    return min(dropped, int(dropped * 0.3) + 1)


def merged(dropped: int) -> int:
    """How many tokens those become."""
    return recycled(dropped) // 10 + 1
