"""ConnNet: which neighbours of a pixel belong to the same object, instead of which pixels do.

Kampffmeyer et al. 2018, https://arxiv.org/abs/1804.07836.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur.method import register
from secateur.saliency.objects.connectivity import decode, encode, instances, mutual, voted
from secateur.saliency.objects.features import Pyramid, smaller
from secateur.saliency.objects.method import Lesson, ObjectMethod, Objects
from secateur.taxonomy import record


class Head(nn.Module):
    """Logits [N, outputs, h, w] at every size of a pyramid, fine to coarse."""

    def __init__(self, channels: Sequence[int], width: int, outputs: int, relations: bool) -> None:
        super().__init__()
        self.pyramid = Pyramid(channels, width, relations)
        self.say = nn.ModuleList(nn.Conv2d(width, outputs, 1) for _ in channels)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        return [say(level) for say, level in zip(self.say, self.pyramid(maps), strict=True)]


@register
@dataclass
class ConnNet(ObjectMethod):
    """For each pixel and each of its neighbours the probability that both belong to the same object.

    >>> found = load_objects("out/connnet").find([picture])[0]  # of secateur.tasks.sod  # doctest: +SKIP

    A pixel is salient where it is linked to any neighbour, and both must say so; what links join is an instance. Objects
    that touch stay apart where the masks that were learned from number them.

    Reconstructed: the optimiser, the size of pictures and the threshold, which the sources at hand don't give; the head is a
    feature pyramid of one width on a backbone that stays as it is.
    """

    info = record("connnet")
    quick: ClassVar[Mapping[str, Any]] = {"width": 4}

    predict: str = field(
        default="links",
        metadata={"help": "links, or mask: a binary head, to compare with", "choices": ("links", "mask")},
    )
    neighbours: int = field(default=8, metadata={"help": "8, or 4: a cross", "choices": (8, 4)})
    threshold: float = field(
        default=0.5, metadata={"help": "probability above which there is a link", "min": 0, "below": 1}
    )
    width: int = field(default=24, metadata={"help": "channels of the head, an even number", "min": 2})
    relations: bool = field(default=True, metadata={"help": "a non-local block on the coarsest map"})
    vote: str = field(
        default="mutual",
        metadata={
            "help": "saliency: the strongest mutual link, or mean of all links",
            "choices": ("mutual", "mean"),
        },
    )
    terms: str = field(
        default="cross-entropy",
        metadata={"help": "cross-entropy, or bicon: BiconNet's loss", "choices": ("cross-entropy", "bicon")},
    )

    def head(self, channels: Sequence[int]) -> nn.Module:
        outputs = 1 if self.predict == "mask" else self.neighbours
        return Head(channels, self.width + self.width % 2, outputs, self.relations)

    def loss(self, head: nn.Module, lesson: Lesson) -> Tensor:
        """Cross-entropy over all links of all pixels, summed over the sizes."""
        total = lesson.masks.new_zeros((), dtype=torch.float32)
        for logits in head(lesson.maps):
            there = smaller(lesson.masks, logits.shape[2:])
            number = torch.arange(1, there.shape[1] + 1, device=there.device)[:, None, None]
            ids = (there * number).amax(1)
            if self.predict == "mask":
                total = total + F.binary_cross_entropy_with_logits(logits[:, 0].float(), (ids > 0).float())
            elif self.terms == "bicon":
                total = total + bicon(logits.float(), encode(ids, self.neighbours), ids > 0)
            else:
                wanted = encode(ids, self.neighbours).float()
                total = total + F.binary_cross_entropy_with_logits(logits.float(), wanted)
        return total

    def read(self, head: nn.Module, maps: Sequence[Tensor]) -> Objects:
        said = head(maps)[0].float().sigmoid()
        if self.predict == "mask":
            saliency, masks, parts = said[:, 0], said[:, 0] > self.threshold, None
        else:
            saliency = voted(said) if self.vote == "mutual" else said.mean(1)
            masks, parts = decode(said, self.threshold), instances(said, self.threshold)
        scores = (saliency * masks).sum((1, 2)) / masks.sum((1, 2)).clamp(min=1)
        return Objects(saliency, masks[:, None], scores[:, None], parts)


def bicon(logits: Tensor, wanted: Tensor, mask: Tensor) -> Tensor:
    """BiconNet's loss of links [N, 8, h, w], their truth, and the mask [N, h, w]: 0.8 of them as they are, 0.2 of mutual ones,
    an edge term, and the strongest link as a mask. Yang et al. 2021, https://arxiv.org/abs/2103.00334."""
    said = logits.sigmoid()
    both, target = mutual(said), wanted.float()
    total = 0.8 * _entropy(said, target) + 0.2 * _entropy(both, target)
    count = target.sum(1)
    edge = (count > 0) & (count < target.shape[1])  # where some link must not be
    total = total - ((1 - both.amin(1)).clamp(min=1e-7).log() * edge).mean()
    return total + _entropy(both.amax(1), mask.float())


def _entropy(said: Tensor, target: Tensor) -> Tensor:
    """Binary cross-entropy of probabilities; torch's own refuses to run under autocast."""
    said = said.clamp(1e-7, 1 - 1e-7)
    return -(target * said.log() + (1 - target) * (1 - said).log()).mean()
