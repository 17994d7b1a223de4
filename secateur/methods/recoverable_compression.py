"""Recoverable Compression: visual outliers stay, the question brings tokens back, clusters and a remainder hold the rest.

Chen et al. 2024, "Recoverable Compression: A Multimodal Vision Token Recovery Mechanism Guided by Text Information",
https://arxiv.org/abs/2409.01179. Spec: recoverable-compression.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from secateur.method import register
from secateur.taxonomy import record
from secateur.tokens.counts import outliers
from secateur.tokens.method import TokenMethod
from secateur.tokens.reduce import clusters, first, others
from secateur.tokens.state import Reduction, TokenSets


@register
@dataclass
class RecoverableCompression(TokenMethod):
    """CLS-attention outliers, outliers in likeness to the question, a few cluster centres and one remainder token.

    >>> with secateur.attach(vlm, "recoverable-compression", text_encoder=encode) as attached:  # doctest: +SKIP
    ...     vlm.generate(**inputs)

    How many tokens stay is decided per image by a local outlier factor. With a target the groups keep their proportions
    and fill it exactly (a reconstruction). text: what the question is compared in: "encoder", the contrastive text tower
    of the same vision tower, `text_encoder(hidden [S, n, C], sets) -> [S, n]`; or "embeddings", the language model's own
    (no text tower needed; not the paper's). neighbours: of the outlier factor for attention and likeness, and for the
    remainder. compat: "paper" (default) makes as many cluster tokens as the share of outliers in the remainder x
    main tokens; "code", as released, x the channel width, and reads the keys of the clusters from the wrong rows.
    """

    neighbours: tuple[int, ...] = (20, 10)
    cluster: int = 32
    text_weight: float = 50.0
    text: str = field(default="encoder", metadata={"choices": ("encoder", "embeddings")})
    compat: str = field(default="paper", metadata={"choices": ("paper", "code")})
    scope: ClassVar[str] = "crop"
    one_crop: ClassVar[str] = "it has outliers and clusters for each crop"
    positions: ClassVar[str] = "compact"
    records: ClassVar[tuple[str, ...]] = ("encoder:-2", "encoder:-1")
    adaptive: ClassVar[bool] = True

    info = record("recoverable-compression")
    quick: ClassVar[Mapping[str, Any]] = {"text": "embeddings"}

    def select(self, sets: TokenSets) -> Reduction:
        query, keys = sets.queries("encoder:-1", cls=True), sets.keys("encoder:-1")
        own = (query * sets.keys("encoder:-1", cls=True)).sum((1, 2))
        dots = torch.einsum("shd,shnd->sn", query, keys).masked_fill(~sets.valid, -torch.inf)
        dots = torch.cat([own[:, None], dots], 1) / query[0].numel() ** 0.5
        attention, likeness = dots.softmax(1)[:, 1:], self.likeness(sets)
        hidden, flat = sets.hidden("encoder:-2").float(), keys.transpose(1, 2).flatten(2)
        found = []
        for i, count in enumerate(sets.count.tolist()):
            keep = None if sets.target is None else int(sets.keep[i])
            x, k, seen, asked = (part[i, :count] for part in (hidden, flat, attention, likeness))
            main, index, merged = self.compress(x, k, seen, asked, keep)
            made = sets.project(merged.to(sets.hidden("encoder:-2").dtype)) if len(merged) else merged
            kept = sets.features[i, main]
            made = made.to(kept.dtype) if len(merged) else kept[:0]
            found.append((torch.cat([main, index]), torch.cat([kept, made])))
        pad = torch.nn.utils.rnn.pad_sequence
        index = pad([index for index, _ in found], batch_first=True, padding_value=-1)
        return Reduction(index, pad([features for _, features in found], batch_first=True))

    def likeness(self, sets: TokenSets) -> Tensor:
        """[S, n]: of each token to the question."""
        if self.text == "embeddings":
            words, real = sets.text("embeddings")
            words, tokens = (F.normalize(part.float(), dim=-1) for part in (words, sets.features))
            return (tokens @ words.mT).masked_fill(~real[:, None], -torch.inf).amax(2)
        return sets.by_text_encoder("encoder:-1")

    def compress(
        self, x: Tensor, keys: Tensor, attention: Tensor, likeness: Tensor, keep: int | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One set: x [n, C], keys [n, d], attention and likeness [n] -> main tokens, places of the merged ones, their [k, C]."""
        n, near = len(x), self.neighbours[0]
        visual = int(outliers(attention[None], near).sum())
        asked = likeness.index_fill(0, first(attention, visual), float(likeness.min()))
        recovered = (n - visual) * int(outliers(asked[None], near).sum()) // n
        if keep is None:
            main = self.main(attention, asked, visual, recovered)
            rest = others(n, main)
            count = min(
                self.count(attention, rest, self.number(len(main), x.shape[1])), max(len(rest) - 1, 0)
            )
        else:
            ratio = visual / (visual + recovered) if visual + recovered else 1.0
            for size in (keep, *range(keep - 2, 0, -1), keep):
                main = self.main(attention, asked, round(size * ratio), size - round(size * ratio))
                rest = others(n, main)
                count = keep - size - 1
                if self.count(attention, rest, self.number(size, x.shape[1])) <= max(count, 0):
                    break
        if count <= 0:
            return main, main[:0], x[:0]
        keys = keys if self.compat == "code" else keys[rest]
        centres, members, merged = clusters(
            x[rest], attention[rest], keys, self.text_weight * asked[rest], count, self.cluster
        )
        remainder = attention[rest[members]] @ x[rest[members]]
        return main, rest[torch.cat([centres, members[:1]])], torch.cat([merged, remainder[None]])

    def main(self, attention: Tensor, asked: Tensor, visual: int, recovered: int) -> Tensor:
        """The tokens that stay as they are, ascending; at least the one that CLS attends to most."""
        seen = first(attention, max(visual, int(visual + recovered == 0)))
        back = first(asked.index_fill(0, seen, -torch.inf), recovered)
        return torch.cat([seen, back]).sort().values

    def number(self, main: int, channels: int) -> int:
        """N of the rule for the cluster tokens."""
        return channels if self.compat == "code" else main

    def count(self, attention: Tensor, rest: Tensor, number: int) -> int:
        """How many cluster tokens the remainder gets: N x its share of outliers."""
        return number * int(outliers(attention[rest][None], self.neighbours[1]).sum()) // max(len(rest), 1)
