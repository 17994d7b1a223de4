"""The kind of method that trains prompts in both towers of a frozen model of pictures and words."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Generator, Tensor

from secateur.method import Method
from secateur.utils.screen import Screen


@dataclass(repr=False)
class Seen(Screen):
    """Features of one batch, all of length 1 but the prototypes: B pictures, C classes, D numbers.

    `image` [B, D] and `text` [C, D] come from the prompted towers, `frozen_image` and `frozen_text` from the frozen ones, `masked` [B, D]
    from the prompted tower that sees the kept patches only (`image` itself where none leaves). `labels` [B], `prototypes` [C, D]: the
    mean frozen feature of a class's pictures. `scale`: what cosines are multiplied by.
    """

    image: Tensor
    masked: Tensor
    frozen_image: Tensor
    text: Tensor
    frozen_text: Tensor
    labels: Tensor
    prototypes: Tensor
    scale: float


@dataclass(repr=False)
class Patches(Screen):
    """Of B pictures: `features` [B, N, D] of the frozen tower's patches, of length 1, the `text` [B, D] of each picture's
    own class, and `attention` [B, N] of CLS to the patches in the last block, a mean over heads; None where there is no CLS."""

    features: Tensor
    text: Tensor
    attention: Tensor | None


@dataclass
class PromptMethod(Method):
    """Trains prompts in both towers: `secateur.prompts.train_prompts`. Write `loss`, and `keep` where patches leave."""

    verb: ClassVar[str] = "prompts"

    text_tokens: int = field(
        default=4, metadata={"help": "prompts in the text tower, behind its start", "min": 1}
    )
    image_tokens: int = field(
        default=4, metadata={"help": "prompts in the image tower, behind the patches", "min": 0}
    )
    depth: int = field(
        default=9, metadata={"help": "blocks that get prompts of their own, of both towers", "min": 1}
    )
    words: str = field(
        default="a photo of a",
        metadata={"help": "what the first text prompts begin as, where it is as many tokens"},
    )

    @classmethod
    def usual(cls) -> dict[str, Any]:
        own = {"objects": "P", "granularity": "token", "when": "PDT", "data": "data", "recovery": "train"}
        return {**super().usual(), **own}

    @property
    def masks(self) -> bool:
        """Whether the loss reads a pass that sees only some patches."""
        return False

    @property
    def drops(self) -> bool:
        """Whether patches that aren't kept leave; else they are zeros."""
        return True

    def keep(self, patches: Patches, generator: Generator) -> Tensor:
        """int64 [B, k], ascending: the patches that the masked pass sees."""
        raise self.lacks("keep")

    def loss(self, seen: Seen) -> Tensor:
        """What is minimised, a scalar."""
        raise self.lacks("loss")
