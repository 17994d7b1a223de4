"""HoloV: every stretch of the image gets a quota of tokens, and keeps the best inside it.

Zou et al. 2025, "Don't Just Chase 'Highlighted Tokens' in MLLMs: Revisiting Visual Holistic Context Retention",
https://arxiv.org/abs/2510.02912. Spec: holov.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from secateur.method import register
from secateur.taxonomy import record
from secateur.tokens.greedy import directions
from secateur.tokens.method import Facts, Stage, TokenMethod
from secateur.tokens.scores import cls_or_received
from secateur.tokens.select import even_runs, quotas, top_per_group
from secateur.tokens.state import Reduction, TokenSets


@register
@dataclass
class HoloV(TokenMethod):
    """Runs of the raster sequence share the budget by mean of attention + scaled variance of their likeness.

    >>> with secateur.attach(vlm, "holov", target="tokens=64") as attached:  # doctest: +SKIP
    ...     vlm.generate(**inputs)

    crops: how many runs; None: 16 with a CLS token, else int(1.778 * tokens / keep), at least 1 (Qwen2.5-VL).
    compat: "paper" ranks inside a run by attention + beta x variance, beta 1; "code" by attention alone, beta 0.09.
    Both cap quotas and pass on what is over, as the paper says (the code pads with zeros). Without CLS, attention
    received stands in. order: "official" emits a run's tokens best first, as the code does; "raster" keeps their order.
    What the paper's appendix D re-injects later is left out: not specified enough.
    """

    crops: int | None = None
    beta: float | None = None
    tau: float = 1.0
    compat: str = field(default="paper", metadata={"choices": ("paper", "code")})
    order: str = field(default="raster", metadata={"choices": ("raster", "official")})
    scope: ClassVar[str] = "image"
    positions: ClassVar[str] = "compact"
    newlines: ClassVar[str] = "drop"

    info = record("holov")

    def stages(self, facts: Facts) -> list[Stage]:
        return [Stage("input", self.select, (f"encoder:{facts.feature_block}",))]

    def select(self, sets: TokenSets) -> Tensor | Reduction:
        attention = cls_or_received(sets, f"encoder:{sets.facts.feature_block}").float() * 1000
        parts = (1024 / 576 * sets.count / sets.keep).long() if not sets.facts.has_cls else 16
        runs, sizes = even_runs(sets.valid, parts if self.crops is None else self.crops)
        variance = self.variance(directions(sets.features, sets.valid, eps=1e-6), runs, sizes)
        beta = (0.09 if self.compat == "code" else 1.0) if self.beta is None else self.beta
        scores, weights = holistic(attention, variance, runs, sizes, beta, self.tau)
        ranking = attention if self.compat == "code" else scores
        kept = top_per_group(ranking, runs, quotas(weights, sets.keep, sizes), sets.valid)
        if self.order == "raster":
            return kept
        index = Reduction.from_mask(kept).index
        at = index.clamp(min=0)
        best = ranking.gather(1, at).argsort(dim=1, descending=True, stable=True)
        after = runs.gather(1, at).masked_fill(index < 0, runs.shape[1])
        best = best.gather(1, after.gather(1, best).argsort(dim=1, stable=True))
        return Reduction(index.gather(1, best))

    @staticmethod
    def variance(rows: Tensor, runs: Tensor, sizes: Tensor) -> Tensor:
        """Variance of each token's cosines with its run, its own counted as 0: [S, n, D] rows of length 1 -> [S, n]."""
        start = (sizes.cumsum(1) - sizes)[..., None] + torch.arange(int(sizes.max()), device=rows.device)
        inside = start < sizes.cumsum(1)[..., None]
        where = start.clamp(max=rows.shape[1] - 1)
        batch = torch.arange(len(rows), device=rows.device)[:, None, None]
        own = rows[batch, where]
        pairs = inside[..., :, None] & inside[..., None, :]
        cosine = (own @ own.mT * pairs).masked_fill_(torch.eye(own.shape[2], device=rows.device).bool(), 0)
        others = (sizes - 1).clamp(min=1)[..., None]
        mean = cosine.sum(3) / others
        found = ((cosine - mean[..., None]) ** 2 * pairs).sum(3) / others * (sizes[..., None] > 1)
        out = torch.zeros(rows.shape[0], rows.shape[1] + 1, device=rows.device)
        place = torch.where(inside, where, rows.shape[1]).flatten(1)
        return out.scatter_(1, place, found.flatten(1))[:, :-1]


def holistic(
    attention: Tensor, variance: Tensor, runs: Tensor, sizes: Tensor, beta: float, tau: float
) -> tuple[Tensor, Tensor]:
    """Scores [S, n] = attention + beta x variance scaled to it run by run, and each run's weight [S, C]."""

    def mean(values: Tensor) -> Tensor:
        inside = torch.arange(values.shape[1], device=values.device) < sizes.sum(1, keepdim=True)
        total = torch.zeros(sizes.shape, device=values.device).scatter_add_(1, runs, values * inside)
        return total / sizes.clamp(min=1)

    scale = (mean(attention.abs()) / (mean(variance.abs()) + 1e-6)).gather(1, runs)
    alone = sizes.gather(1, runs) == 1
    scores = torch.where(alone, (1 + beta) * attention, attention + beta * scale * variance)
    power = mean(scores).clamp(min=0) ** tau * (sizes > 0)
    return scores, power / (power.sum(1, keepdim=True) + 1e-6)
