"""CATP: images of in-context prompts keep what covers them and suits their text, then what the query comes to look at.

Li et al. 2025, "CATP: Contextually Adaptive Token Pruning for Efficient and Enhanced Multimodal In-Context Learning",
https://arxiv.org/abs/2508.07871. Spec: catp.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from secateur.errors import SecateurError
from secateur.method import register
from secateur.taxonomy import record
from secateur.tokens.counts import floors
from secateur.tokens.greedy import Picks, coverage, directions
from secateur.tokens.method import Facts, Stage, TokenMethod
from secateur.tokens.reduce import mean_of
from secateur.tokens.select import top_per_row
from secateur.tokens.state import TokenSets


def covering(features: Tensor, text: Tensor, keep: Tensor, valid: Tensor, weight: float) -> Picks:
    """Greedy picks by coverage of all features plus `weight` x likeness to the text [S, 1, D]; likeness is (cos + 1) / 2."""
    rows, words = directions(features, valid), directions(text)
    both = valid[:, :, None] & valid[:, None]
    likeness = ((rows @ rows.mT + 1) / 2).masked_fill(~both, 0)
    aligned = ((rows @ words.mT)[..., 0] + 1) / 2
    return coverage(likeness, keep, valid, own=weight * aligned * (text != 0).any(2))


def relevance(now: Tensor, before: Tensor, cosine: Tensor, weight: float) -> Tensor:
    """The growth of attention from one layer to the next, where it grows, plus `weight` x cosine, all [S, n]."""
    return (now - before).clamp(min=0) + weight * cosine


@register
@dataclass
class CATP(TokenMethod):
    """Half of what must go leaves each image before the LLM, the rest after layers k (context) and k + 1 (query image).

    >>> with secateur.attach(vlm, "catp", target="22.2%") as attached:  # doctest: +SKIP
    ...     vlm.generate(**inputs)  # image, text, image, text, ..., query image, query

    Text belongs to the image that it follows; the last image and what follows it are the query, the others the context.
    First, each image: coverage of its features plus `lambda1` x likeness to the mean embedding of its text. Then the
    context's tokens together: growth of the last token's attention from layer k - 1 to k plus `lambda2` x cosine with the
    mean state of the query. Last, the query image: cosine with the mean state of what is left of the context, its text
    included ("all") or not ("image"). The target is the share 1 - R of the image tokens that layers from k + 2 on see, or a
    number an image; counts are floors, the context's one for all of its images. Separators of a grid count as tokens.
    An image without text is refused where it is a demonstration; `bare="zero"` leaves its likeness to text out, as it is
    left out for a query image without text.

    Reconstructed: k counts layers from 0; position ids stay; floors in the second stage; a prompt of one image is judged by
    the mean state of its text; what the context's mean is taken of.
    """

    k: int | None = field(
        default=None,
        metadata={
            "help": "the layer that ranks the context, from 0; none: the paper's 6, 10 of 40 layers, scaled for fewer than 28",
            "min": 1,
        },
    )
    lambda1: float = field(
        default=0.7, metadata={"help": "weight of the likeness to the image's text", "min": 0}
    )
    lambda2: float = field(default=0.6, metadata={"help": "weight of the cosine with the query", "min": 0})
    context: str = field(
        default="all",
        metadata={"help": "tokens whose mean ranks the query image", "choices": ("all", "image")},
    )
    bare: str = field(
        default="refuse",
        metadata={"help": "demonstrations without text", "choices": ("refuse", "zero")},
    )
    scope: ClassVar[str] = "image"
    no_budget: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("frame", "image", "all"), "it divides its target over demonstrations and query image itself"
    )
    positions: ClassVar[str] = "original"
    newlines: ClassVar[str] = "compete"

    info = record("catp")

    def stages(self, facts: Facts) -> list[Stage]:
        k = self.k
        if k is None:
            k = 10 if facts.layers >= 40 else 6 if facts.layers >= 28 else facts.spread((6, 7, 8), of=32)[0]
        if k > facts.layers - 3:
            raise SecateurError(
                f"k={k}: two more layers must follow the one after layer {k}, and the model has {facts.layers}",
                where="catp",
                fix=f"k={facts.layers - 3} or less",
            )
        before, here, after = (f"layer:{layer}" for layer in (k - 1, k, k + 1))
        return [
            Stage("input", self.cover),
            Stage(after, partial(self.rank_context, before, here), (before, here), scope="row"),
            Stage(f"layer:{k + 2}", partial(self.rank_query, after), (after,), scope="row"),
        ]

    def cover(self, sets: TokenSets) -> Tensor:
        words, there = sets.text("embeddings", of="image")
        if self.bare == "refuse":
            self._refuse_bare(sets, there)
        half = floors(sets.total * (1 + sets.asked_share) / 2).clamp(min=1)
        # what each token that stays says of its image: the tokens and the image that it is a part of
        sets.carried["tokens"] = (sets.total / half)[:, None].expand_as(sets.valid)
        sets.carried["image"] = (1 / half)[:, None].expand_as(sets.valid)
        return covering(sets.features, mean_of(words, there), half, sets.valid, self.lambda1).mask(
            sets.valid.shape[1]
        )

    def _refuse_bare(self, sets: TokenSets, there: Tensor) -> None:
        for image, row, words in zip(sets.image.tolist(), sets.row.tolist(), there.any(1).tolist()):
            last = int(sets.image[sets.row == row].max())
            if image != last and not words:
                raise SecateurError(
                    f"image {image} of row {row} is a demonstration without text",
                    where="catp",
                    fix='put its text behind it, or say bare="zero": it is then chosen by coverage alone',
                )

    def _query(self, sets: TokenSets) -> Tensor:
        """bool [S, n]: tokens of the row's last image."""
        last = sets.image_of.gather(1, (sets.count - 1)[:, None])
        return (sets.image_of == last) & sets.valid

    def _left(self, sets: TokenSets, mine: Tensor) -> Tensor:
        """[S] how many of the tokens `mine` [S, n] may stay: all that the first stage left of some images."""
        tokens, images = (
            sets.carried[name].double().masked_fill(~mine, 0).sum(1).round() for name in ("tokens", "image")
        )
        if sets.share is not None:
            return floors(tokens * sets.share).clamp(min=1)
        return torch.minimum(tokens, images * int(sets.target or 0)).long()

    def rank_context(self, before: str, here: str, sets: TokenSets) -> Tensor:
        query = self._query(sets)
        context = sets.valid & ~query
        asked = mean_of(*sets.text(here, of="query", visual=True))
        scores = relevance(
            sets.attention(here, rows="last"),
            sets.attention(before, rows="last"),
            F.cosine_similarity(sets.hidden(here).float(), asked, dim=-1),
            self.lambda2,
        )
        return query | top_per_row(scores, self._left(sets, context), context)

    def rank_query(self, here: str, sets: TokenSets) -> Tensor:
        query = self._query(sets)
        context, states = sets.valid & ~query, sets.hidden(here)
        if self.context == "image":
            distilled = mean_of(states, context)
        else:
            distilled = mean_of(*sets.text(here, of="context", visual=True))
        alone = mean_of(*sets.text(here, of="query"))
        distilled = torch.where(context.any(1)[:, None, None], distilled, alone)
        scores = F.cosine_similarity(states.float(), distilled, dim=-1)
        return context | top_per_row(scores, self._left(sets, query), query)
