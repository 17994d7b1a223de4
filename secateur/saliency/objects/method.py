"""The kind of method that learns which objects stand out, on the maps of a network that stays as it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from secateur.errors import SecateurError
from secateur.method import Method
from secateur.saliency.objects.connectivity import as_mask
from secateur.utils.screen import Screen


@dataclass(repr=False)
class Objects(Screen):
    """What stands out in pictures.

    `saliency` [N, H, W] in 0..1. `masks` bool [N, K, H, W], the opinions, best first, and `scores` [N, K] how much each is
    liked, in 0..1 (0 for a place that no opinion fills). `instances` int64 [N, H, W], objects numbered from 1, where a method
    tells them apart.
    """

    saliency: Tensor
    masks: Tensor
    scores: Tensor
    instances: Tensor | None = None


@dataclass(repr=False)
class Lesson(Screen):
    """A batch to learn from: `maps` [N, C, h, w], fine to coarse, and `masks` bool [N, G, H, W] with `count` [N] of them true
    of each picture; the others are empty."""

    maps: list[Tensor]
    masks: Tensor
    count: Tensor


@dataclass
class ObjectMethod(Method):
    """Learns which objects stand out: `secateur train sod`.

    Write `head`, `loss` and `read`. The backbone stays as it is and its maps are computed once; only the head learns.
    """

    verb: ClassVar[str] = "train_objects"
    several: ClassVar[bool] = False
    """Whether it learns several opinions of one picture, so from pictures that have them."""

    @classmethod
    def usual(cls) -> dict[str, Any]:
        own: dict[str, Any] = {
            "objects": "S",
            "criteria": "none",
            "order": "-",
            "data": "data",
            "recovery": "train",
        }
        own |= {"budget_exact": None, "supervision": "supervised"}
        return {**super().usual(), **own, **dict.fromkeys(("decision", "scope"), "-")}

    def head(self, channels: Sequence[int]) -> nn.Module:
        """The network that learns, for maps of so many channels, fine to coarse."""
        raise self.lacks("head")

    def loss(self, head: nn.Module, lesson: Lesson) -> Tensor:
        """What the head is trained by, a scalar."""
        raise self.lacks("loss")

    def read(self, head: nn.Module, maps: Sequence[Tensor]) -> Objects:
        """What stands out in the pictures of these maps, at the size of what the head draws."""
        raise self.lacks("read")


def as_truth(mask: Tensor, size: Sequence[int], where: str = "mask") -> Tensor:
    """bool [G, H, W] of the mask [H, W], or the masks [G, H, W] of several opinions, of a picture of this size.

    >>> as_truth(torch.tensor([[0, 2], [0, 0]]), (2, 2)).sum().item()
    1

    Raises `SecateurError`: floats, negative numbers, another size, no object.
    """
    own = as_mask(mask, where) > 0
    own = own[None] if own.dim() == 2 else own
    if own.dim() != 3 or tuple(own.shape[1:]) != tuple(size):
        raise SecateurError(
            f"it is {tuple(mask.shape)}, the picture {tuple(size)}", where=where, fix="give [height, width]"
        )
    if not own.any():
        raise SecateurError("it shows no object", where=where, fix="leave out pictures whose mask is empty")
    return own
