"""PSA: key blocks at several resolutions, by how much a block of queries looks at them.

"PSA: Pyramid Sparse Attention for Efficient Video Understanding and Generation", 2025, https://arxiv.org/abs/2512.04025. Spec: psa.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from secateur.attention.estimate import antidiagonal, sampled
from secateur.attention.layout import Layout
from secateur.attention.levels import (
    by_energy,
    by_rank,
    by_threshold,
    cap_by_likeness,
    capped,
    check_ends,
    stretched,
)
from secateur.attention.method import AttentionMethod
from secateur.attention.order import alike, beside, check_grid, gilbert, tiles
from secateur.errors import SecateurError
from secateur.method import register
from secateur.pruning.target import parse_target
from secateur.taxonomy import record

ENDS = {
    "topk": (0.10, 0.15, 0.15, 0.35),
    "thresholdbound": (0.5, 0.6, 0.7, 0.8),
    "energybound": (0.7, 0.8, 0.9, 0.9),
}
"""Where levels 1, 2, 4, 8 end, as released: the library's default, Wan2.1-1.3B, Qwen2.5-VL."""


@register
@dataclass
class PSA(AttentionMethod):
    """Keys are pooled by 2, 4 and 8; each block of queries reads each block of keys at the level that its importance earns.

    >>> with secateur.attach(model, "psa", density="25%") as attached:  # doctest: +SKIP
    ...     model(input_ids)
    >>> attached.report["density"]  # doctest: +SKIP

    mask: topk gives levels by rank, so that `density` can be asked for; thresholdbound and energybound by the share of the row that
    blocks hold. ends: where levels 1, 2, 4, 8 end; equal neighbours leave a level out, (d, d, d, d) is a binary mask. estimate:
    antidiagonal sums (auto: where attention is causal, as released, and stride divides the keys ahead) or sampled positions. alike: mean
    cosines of neighbours 2, 4, 8 apart above which a block may be pooled so far; () pools any. Blocks on the diagonal and the first one are read whole where attention is causal.

    Videos: order puts tokens that belong together into one block: along a curve (gilbert), in tiles, by k-means of queries and of keys
    (alike, with so many clusters), or mix, the curve for queries and clusters for keys. grid: frames, rows and columns of tokens;
    text: tokens beside them (text_first: before), which go to the end and are read whole. Outputs come back in the model's order.
    warmup: the first runs of the model, such as steps of denoising, that stay dense.

    Checked: the release's own functions on random scores gave the same levels in 200 of 200 cases each of topk, thresholdbound and the
    causal forms of topk and energybound; its antidiagonal and sampled estimates the same importance (40 of 40 and 30 of 30, the
    sampled one up to a row's sum, by which the release divides); its curve the same path in 512 of 512 grids. Its likeness differs in a
    last block that isn't full (3 of 592 blocks), where the release counts copies of the last token and this doesn't.

    Reconstruction: `density`, which stretches the ends; under a causal mask blocks that must be read come first in rank, where
    the release reads them on top of the others; sampled positions are the same for all items of a batch; k-means starts anew at each run,
    where the release goes on from the centres of the step before.
    """

    density: str | float = ""
    mask: str = field(default="topk", metadata={"choices": tuple(ENDS)})
    ends: tuple[float, ...] | None = None
    estimate: str = field(default="auto", metadata={"choices": ("auto", "antidiagonal", "sampled")})
    alike: tuple[float, ...] = ()
    stride: int = 16
    normalise: bool = False
    order: str = field(default="", metadata={"choices": ("", "gilbert", "tiles", "alike", "mix")})
    grid: tuple[int, ...] = ()
    tile: tuple[int, ...] = (2, 8, 8)
    text: int = 0
    text_first: bool = True
    clusters: tuple[int, int] = (200, 1000)
    block_k: int = 128

    info = record("psa")
    quick: ClassVar[dict[str, Any]] = {"block_q": 16, "block_k": 16, "stride": 4, "density": 0.5}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.density != "" and self.mask != "topk":
            raise SecateurError(
                f"{self.mask} reads as much as the scores ask for",
                where="density",
                fix="leave it out and give ends=, or mask=topk",
            )
        check_ends(self.bounds)
        if self.alike and (len(self.alike) != 3 or not all(-1 <= cosine <= 1 for cosine in self.alike)):
            raise SecateurError(
                f"{self.alike} aren't mean cosines of neighbours 2, 4 and 8 apart",
                where="alike",
                fix="three numbers from -1 to 1, such as .75,.7,.7, or none",
            )
        if self.order in ("gilbert", "tiles", "mix"):
            check_grid(self.grid)
            check_grid(self.tile, "tile")
        elif self.grid or (self.text and not self.order):
            raise SecateurError("a grid and its text serve an order", where="order", fix="order=gilbert")
        if self.text < 0 or min(self.clusters) < 1:
            raise SecateurError(
                f"text of {self.text} tokens, {self.clusters} clusters",
                where="order",
                fix="0 or more; 1 or more",
            )

    @property
    def bounds(self) -> tuple[float, ...]:
        """Where levels 1, 2, 4, 8 end."""
        ends = ENDS[self.mask] if self.ends is None else self.ends
        return ends if self.density == "" else stretched(ends, parse_target(self.density).share("density"))

    def places(self, q: Tensor, k: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor] | None:
        if not self.order:
            return None
        tokens = q.shape[2] - self.text
        if self.order != "alike" and tokens != math.prod(self.grid):
            raise SecateurError(
                f"{q.shape[2]} tokens aren't a grid of {self.grid} and {self.text} of text",
                where="grid",
                fix="frames, rows and columns of tokens as this model has them; text= for the rest",
            )
        start = self.text if self.text_first else 0
        video = slice(start, start + tokens)
        if self.order in ("gilbert", "tiles"):
            grid = check_grid(self.grid)
            found = gilbert(grid) if self.order == "gilbert" else tiles(grid, check_grid(self.tile, "tile"))
            queries = keys = found.expand(1, 1, -1)
        else:
            keys = alike(k[:, :, video], self.clusters[1], generator=generator)
            if self.order == "alike":
                queries = alike(q[:, :, video], self.clusters[0], generator=generator)
            else:
                queries = gilbert(check_grid(self.grid)).expand(1, 1, -1)
        return tuple(beside(places.to(q.device), self.text, self.text_first) for places in (queries, keys))  # type: ignore[return-value]

    def levels(self, q: Tensor, k: Tensor, layout: Layout, generator: torch.Generator) -> Tensor:
        visible = layout.visible(q.device)
        must = layout.crossed(q.device)
        if layout.causal:
            must = must | (torch.arange(layout.columns, device=q.device) == 0)
        if self.text:
            must = must | (
                torch.arange(layout.columns, device=q.device) >= (layout.keys - self.text) // layout.block_k
            )
        scores = self.importance(q, k, layout, generator)
        if self.mask == "topk":
            scores = torch.where(must, scores + scores.amax() + 1, scores)
            levels = by_rank(scores, visible, self.bounds, must=must)
        else:
            rule = by_threshold if self.mask == "thresholdbound" else by_energy
            levels = rule(scores, visible, self.bounds, must=must)
        if self.alike:
            cap = cap_by_likeness(k, layout.block_k, self.alike).repeat_interleave(
                q.shape[1] // k.shape[1], 1
            )
            levels = capped(levels, cap)
        return levels

    def importance(self, q: Tensor, k: Tensor, layout: Layout, generator: torch.Generator) -> Tensor:
        kind = self.estimate
        if kind == "auto":
            kind = "antidiagonal" if layout.causal and layout.offset % self.stride == 0 else "sampled"
        if kind == "antidiagonal":
            return antidiagonal(q, k, layout, stride=self.stride)
        return sampled(q, k, layout, normalise=self.normalise, generator=generator)
