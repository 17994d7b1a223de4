"""LRS-DIP: a coarse view of a large picture says which tiles of a finer one are read, then which tokens of them stay.

Luo et al. 2025, "When Large Vision-Language Model Meets Large Remote Sensing Imagery: Coarse-to-Fine Text-Guided Token Pruning",
ICCV 2025, https://arxiv.org/abs/2503.07588. Spec: lrs-dip.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from secateur.method import register
from secateur.taxonomy import record
from secateur.tokens.counts import floors
from secateur.tokens.glimpse import read_weights
from secateur.tokens.method import Facts, Glimpse, Stage, TokenMethod
from secateur.tokens.pyramid import voted
from secateur.tokens.select import top_per_row
from secateur.tokens.state import TokenSets


def standing_out(
    scores: Tensor, mine: Tensor, low: float = 0.05, high: float = 0.95, least: float = 0.1
) -> Tensor:
    """bool [S, n]: of `mine`, scores that lie above `least` between their 5th and 95th percentile."""
    spread = scores.masked_fill(~mine, torch.nan)
    bottom, top = (spread.nanquantile(q, dim=1, keepdim=True) for q in (low, high))
    return mine & ((scores - bottom) / (top - bottom).clamp(min=1e-12) > least)


@register
@dataclass
class LRSDIP(TokenMethod):
    """A few decoder layers look at a coarse view; what the question's token attends to picks the next level's tiles, then tokens.

    >>> from secateur.tokens.pyramid import pyramid
    >>> views = pyramid(picture, 336)  # doctest: +SKIP
    >>> inputs = processor(images=views.tiles[0], text="<image>" + question)  # doctest: +SKIP
    >>> inputs |= processor.image_processor(list(views.tiles), return_tensors="pt")  # doctest: +SKIP
    >>> with secateur.attach(vlm, "lrs-dip", target="25%", most=6, given={"pyramid": [views]}) as attached:  # doctest: +SKIP
    ...     vlm.generate(**inputs)

    The thumbnail and the level above it are read whole. The target is the share of a level's tokens that vote for tiles of the
    next, and in the end of the last level's tokens that stay, beside the thumbnail and the separators of grid rows; other tiles never
    go through the tower. Models whose processor makes a thumbnail and tiles (LLaVA-NeXT) need no `pyramid`. Plain pictures lose
    tokens by the same look.

    The paper trains the layers that look (`rfm`) to attend as deep layers do. Untrained, they are the model's own first half, which on
    mosaics of scenes find hardly more than chance. Left out: the training, for which a bench has a lesson of its own
    (`benchmarks/mosaic.py`); pooling of tiles to 12 x 12 tokens, which the authors' model is trained with. By this library:
    `rank="scores"`. The levels and tiles equal the released code's to the bit (12 pictures; sizes alone: 20,000).
    """

    layers: tuple[int, ...] = field(
        default=(), metadata={"help": "decoder layers that look, from 0; none: the first half", "min": 0}
    )
    rfm: str = field(
        default="",
        metadata={"help": "safetensors file of trained weights for these layers, by 0.mlp.up_proj.weight"},
    )
    token: str = field(
        default="last",
        metadata={
            "help": "asks: the prompt's last, or the next after the image",
            "choices": ("last", "next"),
        },
    )
    most: int = field(
        default=0, metadata={"help": "tiles of a level that are read at most; 0: all with a vote", "min": 0}
    )
    rank: str = field(
        default="votes",
        metadata={
            "help": "which tiles are the most: by votes, or the votes' scores",
            "choices": ("votes", "scores"),
        },
    )
    steps: int = field(default=1, metadata={"help": "levels whose tiles are chosen", "min": 1})
    concat_levels: bool = field(
        default=False, metadata={"help": "the voting tokens of coarser levels stay too"}
    )
    threshold: bool = field(
        default=False,
        metadata={"help": "tokens above a tenth of their scores' spread, in place of the target's share"},
    )
    scope: ClassVar[str] = "image"
    positions: ClassVar[str] = "compact"
    newlines: ClassVar[str] = "compete"
    no_budget: ClassVar[Mapping[str, str]] = {"all": "each picture has levels of its own"}

    info = record("lrs-dip")

    def stages(self, facts: Facts) -> list[Stage]:
        layers = self.layers or tuple(range((facts.layers + 1) // 2))
        glimpse = Glimpse(layers, read_weights(self.rfm) if self.rfm else None)
        site = f"layer:{layers[-1]}"
        return [
            Stage("tiles", partial(self.zoom, site), (site,), glimpse=glimpse),
            Stage("input", partial(self.prune, site), (site,), glimpse=glimpse),
        ]

    def chosen(self, site: str, sets: TokenSets) -> tuple[Tensor, Tensor]:
        """bool [S, n], the best of the finest level and its separators, and the scores [S, n]."""
        level = torch.zeros_like(sets.index) if sets.level is None else sets.level
        mine = sets.valid & (level == level.masked_fill(~sets.valid, -1).amax(1, keepdim=True))
        asks: str | Tensor = "last" if self.token == "last" else sets.text("columns")[0][:, :1]
        attention = sets.attention(site, rows=asks, over="visual", heads=True).masked_fill(~mine[:, None], 0)
        # softmax over the level's own tokens, head by head
        scores = (attention / attention.sum(2, keepdim=True).clamp(min=1e-30)).mean(1)
        if self.threshold:
            best = standing_out(scores, mine)
        else:
            count = mine.sum(1)
            share = sets.share
            keep = floors(count * share) if share is not None else count.clamp(max=int(sets.target or 0))
            best = top_per_row(scores, keep.clamp(min=1), mine)
        return best | mine & sets.newline, scores

    def zoom(self, site: str, sets: TokenSets) -> Tensor:
        """bool [S, tiles] of the next level."""
        assert sets.level is not None and sets.tiles is not None and sets.maps is not None
        here = sets.reading - 1
        depth = (sets.tiles.amin(2) > 0).sum(1)
        next_grid = sets.tiles[:, sets.reading]
        out = torch.zeros(len(sets), int(next_grid.prod(1).max()), dtype=torch.bool, device=sets.device)
        base = torch.where(depth > 2, 1, 0)
        best, scores = self.chosen(site, sets)
        sets.carried["voted"] = (best & (here >= base)[:, None]).float()
        for i, (rows, cols) in enumerate(next_grid.tolist()):
            if here < int(base[i]):
                out[i, : rows * cols] = True
            elif here - int(base[i]) < self.steps:
                places = torch.stack([sets.grid_row[i], sets.grid_col[i]], 1)
                size = tuple(sets.maps[i, here].tolist())
                weights = scores[i] if self.rank == "scores" else None
                out[i, : rows * cols] = voted(best[i], places, size, (rows, cols), self.most, weights)
        return out

    def prune(self, site: str, sets: TokenSets) -> Tensor:
        best, _ = self.chosen(site, sets)
        if sets.level is None or sets.tiles is None:
            return best
        keep = best | (sets.level == 0) & (sets.level.amax(1, keepdim=True) > 0)
        if self.concat_levels and "voted" in sets.carried:
            keep = keep | (sets.carried["voted"] > 0)
        return keep & sets.valid
