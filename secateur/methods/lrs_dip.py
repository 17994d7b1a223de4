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

from secateur.errors import SecateurError
from secateur.method import register
from secateur.taxonomy import record
from secateur.tokens.counts import floors
from secateur.tokens.glimpse import read_weights
from secateur.tokens.method import Facts, Glimpse, Lesson, Stage, TokenMethod
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


def distillation(look: Tensor, guide: Tensor, mine: Tensor, there: Tensor) -> Tensor:
    """How far the logits of the layers that look are from the guide's, both [S, H, N]: a mean over sets, heads and three terms.

    >>> logits = torch.randn(2, 4, 10)
    >>> every = torch.ones(2, 10, dtype=torch.bool)
    >>> distillation(logits, logits, every[:, :8], every).item()
    0.0

    `mine` [S, n]: of the first n keys those that tokens are chosen from; `there` [S, N]: keys that are no padding. The terms: divergence of
    the guide's softmax over all keys; the same over `mine` at temperature 2, without its square; mean squared difference of
    these logits at that temperature. No gradient reaches the guide.
    """
    guide = guide.detach()
    local, some = (logits[..., : mine.shape[1]] / 2 for logits in (look, guide))
    count = mine.sum(1)[:, None].clamp(min=1)
    apart = ((local - some).square() * mine[:, None]).sum(2) / count
    return (_divergence(look, guide, there) + _divergence(local, some, mine) + apart).mean() / 3


def _divergence(said: Tensor, wanted: Tensor, there: Tensor) -> Tensor:
    """[S, H] KL(softmax(wanted) || softmax(said)) over the keys that are `there` [S, N]."""
    said, wanted = (x.masked_fill(~there[:, None], -torch.inf).log_softmax(2) for x in (said, wanted))
    each = wanted.exp() * (wanted - said)
    return each.masked_fill(~there[:, None], 0).sum(2)


def _logits(sets: TokenSets, site: str) -> Tensor:
    """[S, H, n + m] of the last token of the prompt: for the set's tokens, and for the words behind them."""
    query, keys = sets.queries(site, cls=True), sets.keys(site)
    words = sets.text(f"{site}:keys")[0].permute(0, 2, 1, 3)
    keys = torch.cat([keys, words], 2)  # [S, H_kv, n + m, d]
    keys = keys.repeat_interleave(query.shape[1] // keys.shape[1], 1)
    return (keys @ query[..., None])[..., 0] * query.shape[-1] ** -0.5


def _mean(noted: Mapping[str, Tensor], own: Tensor) -> Tensor:
    """The layers' losses, and the model's own where it is trained too."""
    found = torch.stack([value for name, value in noted.items() if name.startswith("distilled")]).mean()
    return found + own if own.requires_grad else found


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

    The prompt holds places for the thumbnail alone; room is made for the tiles that are read, and for no others, so time doesn't
    grow with the picture. What the look costs is in `tokens_x_layers` and `flops` of the report.

    >>> trained = secateur.train_tokens(vlm, "lrs-dip", data=batches, target="25%", layers=(12, 13, 14, 15))  # doctest: +SKIP
    >>> with secateur.attach(vlm, "lrs-dip", target="25%", weights=trained) as attached: ...  # doctest: +SKIP

    Untrained, the layers that look are the model's own. They are trained as copies of deeper ones, by the losses of the released code: of the
    first and the last (of four; with more, of all but the second and third), in each head, for the prompt's last token: divergence
    of the model's own attention over all tokens, divergence at temperature 2 and mean squared difference of logits over the
    level's tokens. Left out: pooling of tiles to 12 x 12 tokens, which the authors' model is trained with.

    Departs from the released code: the first divergence is over the picture's tokens and the words behind it, without what stands before the
    picture and without the answer, of which that code shows the keys; one answer a sample; the layers' last norm, which nothing reads, isn't
    trained. By this library: `rank="scores"`, `zooms` above one (that code stops after one). The levels and tiles equal the
    released code's to the bit (12 pictures; sizes alone: 20,000).
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
    zooms: int = field(default=1, metadata={"help": "levels whose tiles are chosen", "min": 1})
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
        layers = self.copies(facts)
        glimpse = Glimpse(layers, read_weights(self.rfm) if self.rfm else None)
        site = f"layer:{layers[-1]}"
        return [
            Stage("tiles", partial(self.zoom, site), (site,), glimpse=glimpse),
            Stage("input", partial(self.prune, site), (site,), glimpse=glimpse),
        ]

    # -- training --

    def copies(self, facts: Facts) -> tuple[int, ...]:
        return self.layers or tuple(range((facts.layers + 1) // 2))

    def lessons(self, facts: Facts) -> list[Lesson]:
        if self.rfm or self.token != "last":
            raise SecateurError(
                "the look is trained from the model's own layers, for the prompt's last token",
                where="lrs-dip",
                fix="leave out rfm and token",
            )
        layers = self.copies(facts)
        sites = [f"layer:{n}" for i, n in enumerate(layers) if i not in (1, 2) or n == layers[-1]]
        watch = Stage("input", partial(self.watch, sites), tuple(sites), glimpse=Glimpse(layers))
        deep = [f"{site}:peek" if site == f"layer:{layers[-1]}" else site for site in sites]
        compare = Stage(f"layer:{layers[-1]}", partial(self.compare, deep), tuple(deep))
        return [Lesson("distillation", [watch, compare], _mean)]

    def watch(self, sites: list[str], sets: TokenSets) -> Tensor:
        """Everything stays; what the look's last token attends to is noted."""
        for number, site in enumerate(sites):
            sets.noted[f"look {number}"] = _logits(sets, site)
        return sets.valid

    def compare(self, sites: list[str], sets: TokenSets) -> Tensor:
        for number, site in enumerate(sites):
            logits, there = _logits(sets, site), sets.text(f"{site}:keys")[1]
            sets.noted[f"distilled {number}"] = distillation(
                sets.noted[f"look {number}"], logits, sets.finest, torch.cat([sets.valid, there], 1)
            )
        return sets.valid

    # -- choosing --

    def chosen(self, site: str, sets: TokenSets) -> tuple[Tensor, Tensor]:
        """bool [S, n], the best of the finest level and its separators, and the scores [S, n]."""
        mine = sets.finest
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
        assert sets.tiles is not None and sets.maps is not None
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
            elif here - int(base[i]) < self.zooms:
                places = torch.stack([sets.grid_row[i], sets.grid_col[i]], 1)
                size = tuple(sets.maps[i, here].tolist())
                weights = scores[i] if self.rank == "scores" else None
                out[i, : rows * cols] = voted(best[i], places, size, (rows, cols), self.most, weights)
        return out

    def prune(self, site: str, sets: TokenSets) -> Tensor:
        best, _ = self.chosen(site, sets)
        keep = best | (sets.level == 0) & (sets.level.amax(1, keepdim=True) > 0)
        if self.concat_levels and "voted" in sets.carried:
            keep = keep | (sets.carried["voted"] > 0)
        return keep & sets.valid
