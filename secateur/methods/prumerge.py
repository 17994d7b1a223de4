"""PruMerge: patches whose attention from CLS is an outlier, each with the patches like it added, and one token for the rest.

Shang et al. 2024, "LLaVA-PruMerge: Adaptive Token Reduction for Efficient Large Multimodal Models",
https://arxiv.org/abs/2403.15388. There is no sheet: the facts are those of the released code, 42Shawn/LLaVA-PruMerge at 097c041.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from secateur.method import register
from secateur.taxonomy import record
from secateur.tokens.method import Facts, Stage, TokenMethod
from secateur.tokens.reduce import first, gathered, others
from secateur.tokens.state import Missing, Reduction, TokenSets


@register
@dataclass
class PruMerge(TokenMethod):
    """Outliers of the CLS attention in the tower's last block, the nearest patches by key merged into each.

    >>> with secateur.attach(vlm, "prumerge", plus=True) as attached:  # doctest: +SKIP
    ...     vlm.generate(**inputs)

    Attention is softmax(q k / sqrt(width)) over the whole width, as one head. Without a target an image keeps as many patches
    as lie above Q3 + 1.5 (Q3 - Q1) of its attention, by attention. Each gets the attention-weighted sum of the `cluster`
    patches, kept or not, whose keys are nearest by cosine added to its own feature. One more token is the weighted sum
    of all patches that weren't kept. Tokens merge before the projector, or behind one that joins tokens. Each crop has its own.
    plus: PruMerge+, which also keeps every s'th patch, s = int(int(patches / outliers) / 3), about three for each outlier.
    With a target, k tokens are k - 1 patches and the rest token; plus: a quarter of the patches by attention, the others
    evenly spread over what is left (a reconstruction: for training the release has as many of each, some of them twice).
    A tower without CLS is ranked by attention received there (a stand-in, not the paper's).

    Differs from the paper, which speaks of weighted averages: the release's sums are not divided by their weights; so here.
    Differs from the release: crops and pictures of a batch have outliers of their own, where it counts those of all together;
    an image without outliers is its rest token alone, with plus too, where the release divides by zero.

    Checked: the release's own functions, run on random towers of 24 blocks and 576 patches, several pictures and padding, gave the
    same tokens and logits in 48 of 50 runs of three pictures without a target, 48 with plus, and 45 with 33 to 145 tokens; in the
    others two keys or two attentions are equal to within 3e-6, which single precision doesn't tell apart.
    """

    plus: bool = field(default=False, metadata={"help": "PruMerge+: evenly spread patches too"})
    cluster: int = field(default=32, metadata={"help": "patches merged into each that stays", "min": 1})
    scope: ClassVar[str] = "crop"
    one_crop: ClassVar[str] = "it has outliers and clusters for each crop"
    positions: ClassVar[str] = "compact"
    newlines: ClassVar[str] = "drop"
    adaptive: ClassVar[bool] = True

    info = record("prumerge")

    def stages(self, facts: Facts) -> list[Stage]:
        return [Stage("input", self.select, ("encoder:-1", f"encoder:{facts.feature_block}"))]

    def select(self, sets: TokenSets) -> Reduction:
        site, keys = f"encoder:{sets.facts.feature_block}", sets.keys("encoder:-1").transpose(1, 2).flatten(2)
        attention = self.attention(sets)
        try:
            features, before = sets.hidden(site), True
            sets.project(features[:, :1])
        except Missing:
            features, before = sets.features, False
        index, made = [], []
        for i, count in enumerate(sets.count.tolist()):
            keep = None if sets.target is None else int(sets.keep[i])
            x, k, seen = features[i, :count].float(), keys[i, :count], attention[i, :count]
            if keep == count:
                index.append(torch.arange(count, device=sets.device))
                made.append(sets.features[i, :count])
                continue
            places, merged = self.merge(x, k, seen, keep)
            merged = merged.to(features.dtype)
            index.append(places)
            made.append((sets.project(merged) if before else merged).to(sets.features.dtype))
        pad = torch.nn.utils.rnn.pad_sequence
        return Reduction(pad(index, batch_first=True, padding_value=-1), pad(made, batch_first=True))

    @staticmethod
    def attention(sets: TokenSets) -> Tensor:
        """[S, n]: of CLS over the whole width, as one head."""
        keys = sets.keys("encoder:-1")
        try:
            query, own = sets.queries("encoder:-1", cls=True), sets.keys("encoder:-1", cls=True)
        except Missing:
            return sets.attention("encoder:-1", rows="all")
        dots = torch.einsum("shd,shnd->sn", query, keys).masked_fill(~sets.valid, -torch.inf)
        dots = torch.cat([(query * own).sum((1, 2))[:, None], dots], 1)
        return (dots * query[0].numel() ** -0.5).softmax(1)[:, 1:]

    def merge(self, x: Tensor, keys: Tensor, seen: Tensor, keep: int | None) -> tuple[Tensor, Tensor]:
        """One set: x [n, C], keys [n, d], attention [n] -> places of the k tokens and their features [k, C]."""
        n = len(x)
        centres = first(seen, outliers(seen)) if keep is None else self.fixed(seen, max(keep - 1, 1))
        if self.plus and keep is None and len(centres):
            step = max(n // len(centres) // 3, 1)
            even = torch.arange(0, n - 1, step, device=x.device)
            centres = torch.cat([centres, even[~torch.isin(even, centres)]])
        merged = gathered(x, seen, keys, torch.zeros_like(seen), centres, self.cluster)
        rest = others(n, centres)
        if len(rest) == 0 or len(centres) == keep:
            return centres, merged
        return torch.cat([centres, rest[:1]]), torch.cat([merged, (seen[rest] @ x[rest])[None]])

    def fixed(self, seen: Tensor, count: int) -> Tensor:
        """The `count` patches of a target: by attention, and with `plus` three in four evenly spread over the others."""
        if not self.plus:
            return first(seen, count)
        best = first(seen, -(-count // 4))
        rest = others(len(seen), best)
        even = torch.arange(count - len(best), device=seen.device) * len(rest) // max(count - len(best), 1)
        return torch.cat([best, rest[even]])


def outliers(values: Tensor) -> int:
    """How many of [n] numbers lie above the third quartile by more than 1.5 times the distance of the quartiles.

    >>> outliers(torch.tensor([1.0, 2.0, 3.0, 4.0, 9.0]))
    1
    """
    low, high = values.double().quantile(values.new_tensor([0.25, 0.75], dtype=torch.float64))
    return int((values > high + 1.5 * (high - low)).sum())
