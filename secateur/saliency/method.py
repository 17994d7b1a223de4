"""The kind of method that draws a saliency map of a picture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from secateur.method import Method
from secateur.utils.screen import Screen


@dataclass(repr=False)
class Drawn(Screen):
    """What a saliency method drew.

    `values` [N, H, W] of any size, the `targets` [N] it asked for, the `layers` it read, and for maps of single pixels
    the signed `attribution` [N, C, H, W]; `additive` where its numbers are parts of the logit, which may be summed.
    """

    values: Tensor
    targets: Tensor
    layers: tuple[str, ...] = ()
    attribution: Tensor | None = None
    additive: bool = False


@dataclass
class SaliencyMethod(Method):
    """Draws where in a picture the logit of a class comes from: `secateur.saliency`.

    Write `draw`. The engines record activations and gradients (`saliency.record`), propagate relevance
    (`saliency.relevance`) and leave the model as it was; a map has no budget and removes nothing.
    """

    verb: ClassVar[str] = "saliency"
    words: ClassVar[bool] = False
    """Whether it reads texts too, as pictures of one row: `saliency.text`."""
    runs: ClassVar[str] = "one forward and one backward"
    """What it asks of the model for a map, in words."""
    shown_on: ClassVar[str] = "efficientnet-lite0"
    """The network of the examples on its page."""

    @classmethod
    def usual(cls) -> dict[str, Any]:
        own = {"objects": "S", "criteria": "SAL", "order": "-", "data": "input", "budget_exact": None}
        return {**super().usual(), **own, **dict.fromkeys(("task", "decision", "scope"), "-")}

    @classmethod
    def example(cls) -> nn.Module | None:
        """A tiny network for pictures of 16 x 16 in colour, for the common checks of a method that can't read any classifier."""
        return None

    def draw(self, model: nn.Module, image: Tensor, target: Any) -> Drawn:
        """Draw the map of each picture.

        Args:
            model: a classifier.
            image: pictures [N, C, H, W], normalised as the model takes them.
            target: the class, one for each picture, or None for the likeliest.

        Returns:
            Maps [N, H, W] of any size, larger where more comes from.
        """
        raise self.lacks("draw")
