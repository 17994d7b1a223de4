"""PSOD: several masks of one picture from several prompts, and how much people would like each.

Feng et al. 2024, "Pluralistic Salient Object Detection", https://arxiv.org/abs/2409.02368.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur.method import register
from secateur.saliency.objects.features import Pyramid, smaller
from secateur.saliency.objects.method import Lesson, ObjectMethod, Objects
from secateur.saliency.objects.opinions import match, pair_losses, tries, unlike
from secateur.taxonomy import record

TASKS = ("masks", "scores")
TOKENS = 12
"""Rows of the map whose places are tokens, at most."""


class Block(nn.Module):
    """Attention that all tasks share, and a feed-forward expert for each task."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.attend = nn.LayerNorm(width), nn.MultiheadAttention(width, 4, batch_first=True)
        self.experts = nn.ModuleDict({task: _expert(width) for task in TASKS})

    def forward(self, x: Tensor, task: str) -> Tensor:
        y = self.norm(x)
        x = x + self.attend(y, y, y, need_weights=False)[0]
        return x + self.experts[task](x)


def _expert(width: int) -> nn.Module:
    return nn.Sequential(
        nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
    )


class Head(nn.Module):
    """`masks` draws from prompts, `scores` says how much masks would be liked; each runs its own experts only."""

    def __init__(self, channels: Sequence[int], width: int, prompts: int, depth: int) -> None:
        super().__init__()
        self.pyramid = Pyramid(channels, width)
        self.place = nn.Linear(2, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.prompts = nn.Parameter(torch.randn(prompts, width))
        self.ask = nn.ModuleList(nn.MultiheadAttention(width, 4, batch_first=True) for _ in range(2))
        self.think = nn.ModuleList(_expert(width) for _ in range(2))
        self.draw = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))
        self.pixels, self.exists = nn.Conv2d(width, width, 1), nn.Linear(width, 1)
        self.stem = nn.Conv2d(1, width, 4, stride=4)
        self.agree = nn.Conv2d(width, 4, 1)
        self.like = nn.Sequential(nn.Linear(2 * width + 4, width), nn.ReLU(), nn.Linear(width, 1))

    def tokens(self, x: Tensor) -> Tensor:
        """[N, places, width]: a map as tokens that know where they lie."""
        rows, columns = (torch.linspace(-1, 1, side, device=x.device, dtype=x.dtype) for side in x.shape[2:])
        where = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), -1).flatten(0, 1)
        return x.flatten(2).mT + self.place(where)

    def masks(self, levels: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Logits of masks [N, prompts, h, w] and of whether each is there [N, prompts]."""
        at = _deep(levels)
        deep = self.tokens(levels[at])
        for block in self.blocks:
            deep = block(deep, "masks")
        asked = self.prompts.expand(len(deep), -1, -1)
        for ask, think, seen in zip(self.ask, self.think, (deep, self.tokens(levels[max(0, at - 1)]))):
            asked = asked + ask(asked, seen, seen, need_weights=False)[0]
            asked = think(asked) + asked
        scale = asked.shape[-1] ** -0.5
        drawn = torch.einsum("npc,nchw->nphw", self.draw(asked), self.pixels(levels[0])) * scale
        return drawn, self.exists(asked)[..., 0]

    def scores(self, levels: Sequence[Tensor], masks: Tensor) -> Tensor:
        """Logits [N, K] of how much masks [N, K, h, w] would be liked, each on its own."""
        at = _deep(levels)
        count, size = masks.shape[1], [4 * side for side in levels[at].shape[2:]]
        fine = F.interpolate(masks.to(levels[0].dtype), size, mode="area").flatten(0, 1)[:, None]
        deep = self.tokens(levels[at]).repeat_interleave(count, 0) + self.stem(fine).flatten(2).mT
        for block in self.blocks:
            deep = block(deep, "scores")
        inside = F.interpolate(fine, tuple(levels[at].shape[2:]), mode="area").flatten(2)
        pooled = (inside @ deep)[:, 0] / inside.sum(2).clamp(min=1)
        own, said = masks.to(levels[0].dtype).flatten(2), self.agree(levels[0]).sigmoid().flatten(2)
        both = own @ said.mT  # [N, K, 4]
        alike = both / (own.sum(2)[..., None] + said.sum(2)[:, None] - both).clamp(min=1e-3)
        return self.like(torch.cat([deep.mean(1), pooled, alike.flatten(0, 1)], 1)).unflatten(0, (-1, count))[
            ..., 0
        ]


def _deep(levels: Sequence[Tensor]) -> int:
    """Which level's places are tokens: the finest of up to 12 rows, else the coarsest."""
    return next((n for n, level in enumerate(levels) if level.shape[2] <= TOKENS), len(levels) - 1)


@register
@dataclass
class Psod(ObjectMethod):
    """Prompts that each give a mask and whether it is there, and a score of how much people would like it.

    >>> found = load_objects("out/psod").find([picture])[0]  # doctest: +SKIP
    >>> found.masks[0], found.scores[0]  # opinions, best first  # doctest: +SKIP

    Attention is shared; masks and scores have feed-forward experts of their own, chosen by the task. Prompts are paired
    with the true masks one to one (`match`); those without one learn that they aren't there.

    Reconstructed: everything but the two kinds of experts and the prompts, which were all that the sources at hand say: the number of
    prompts, the losses, and that masks of little worth, made from the true ones, are scored by their overlap with the nearest true one, as
    DUTS-MM and DUTS-MQ, with the scores of people, can't be had.
    Departs: both losses are summed on every batch instead of taking turns.
    """

    info = record("psod")
    several = True
    quick: ClassVar[Mapping[str, Any]] = {"width": 4, "depth": 1}

    prompts: int = field(
        default=3, metadata={"help": "masks at most; 1: one mask, to compare with", "min": 1}
    )
    width: int = field(default=32, metadata={"help": "channels of the head, a multiple of 4", "min": 4})
    depth: int = field(default=2, metadata={"help": "blocks with experts", "min": 1})
    preference: float = field(default=1.0, metadata={"help": "weight of the loss of scores", "min": 0})
    margin: float = field(
        default=0.05, metadata={"help": "by which a better mask must score higher", "min": 0}
    )
    present: float = field(
        default=0.5, metadata={"help": "probability from which a mask is there", "min": 0, "max": 1}
    )
    same: float = field(
        default=0.9, metadata={"help": "overlap above which two masks are one", "min": 0, "max": 1}
    )

    def head(self, channels: Sequence[int]) -> nn.Module:
        return Head(channels, self.width + -self.width % 4, self.prompts, self.depth)

    def loss(self, head: nn.Module, lesson: Lesson) -> Tensor:
        assert isinstance(head, Head)
        levels = head.pyramid(lesson.maps)
        drawn, there = head.masks(levels)
        drawn, there = drawn.float(), there.float()
        truths = smaller(lesson.masks, drawn.shape[2:])
        total = drawn.new_zeros(())
        present = torch.zeros_like(there)
        for n, count in enumerate(lesson.count.tolist()):
            entropy, dice = pair_losses(drawn[n].flatten(1), truths[n, :count].flatten(1).float())
            rows, columns = match(entropy + dice)
            total = total + (entropy + dice)[rows, columns].mean() / len(drawn)
            present[n, rows] = 1
        total = total + F.binary_cross_entropy_with_logits(there, present)
        if not self.preference:
            return total
        masks, worth = tries(truths, lesson.count, drawn.detach() > 0)
        scores = head.scores(levels, masks).float().sigmoid()
        order = (self.margin - (scores[:, :, None] - scores[:, None])).clamp(min=0)
        better = worth[:, :, None] > worth[:, None] + self.margin
        ranked = (order * better).sum() / better.sum().clamp(min=1)
        return total + self.preference * (F.smooth_l1_loss(scores, worth, beta=0.1) + ranked)

    def read(self, head: nn.Module, maps: Sequence[Tensor]) -> Objects:
        assert isinstance(head, Head)
        levels = head.pyramid(maps)
        drawn, there = head.masks(levels)
        masks = drawn > 0
        liked, present = head.scores(levels, masks).float().sigmoid(), there.float().sigmoid()
        saliency = torch.zeros_like(drawn[:, 0], dtype=torch.float32)
        kept, scores = torch.zeros_like(masks), torch.zeros_like(liked)
        for n in range(len(masks)):
            order = liked[n].argsort(descending=True, stable=True).tolist()
            chosen = unlike(masks[n], [k for k in order if present[n, k] >= self.present], self.same)
            chosen = chosen or [int(present[n].argmax())]
            kept[n, : len(chosen)], scores[n, : len(chosen)] = masks[n, chosen], liked[n, chosen]
            saliency[n] = drawn[n, chosen[0]].float().sigmoid()
        return Objects(saliency, kept, scores)
