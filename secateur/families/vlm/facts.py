"""What the token engine must know about a model, as data: depths, widths, and where each visual token came from."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Facts:
    """Numbers of one model.

    >>> Facts(layers=32, blocks=24, feature_block=-2).layer(8, of=32)
    8
    """

    layers: int = 0
    """Decoder layers; 0: a plain vision transformer."""
    blocks: int = 0
    """Blocks of the vision tower."""
    feature_block: int = -1
    """The block whose output feeds the projector, counted from the end."""
    has_cls: bool = False
    merge: int = 1
    """Tower patches that make one visual token of the language model."""
    hidden: int = 0
    intermediate: int = 0
    heads: int = 0
    kv_heads: int = 0
    head_dim: int = 0
    gated: bool = True
    """The feed-forward part has three matrices (3ndm), not two (2ndm)."""
    vision_hidden: int = 0
    vision_intermediate: int = 0
    vision_heads: int = 0
    vision_gated: bool = False
    prefix: int = 0
    """Tokens before the patches in the tower: CLS, registers."""
    tokenwise_projector: bool = False
    mrope: bool = False
    first_layer: int = 1
    """The earliest decoder layer before which tokens may leave."""
    video: bool = False

    def layer(self, number: float, of: int | None = None) -> int:
        """A decoder layer: a share of the depth (0..1), or a published number `of` a published depth, scaled."""
        if of:
            return min(round(number * self.layers / of), self.layers - 1)
        if isinstance(number, float):
            return min(round(number * self.layers), self.layers - 1)
        return int(number) if number >= 0 else self.layers + int(number)

    def block(self, number: float, of: int | None = None) -> int:
        """A block of the tower, like `layer`."""
        if of:
            return min(round(number * self.blocks / of), self.blocks - 1)
        if isinstance(number, float):
            return min(round(number * self.blocks), self.blocks - 1)
        return int(number) if number >= 0 else self.blocks + int(number)


@dataclass
class Layout:
    """Where each of the N visual tokens of a batch came from, in the order of the placeholders."""

    image: Tensor
    """[N] number of its image in the batch."""
    crop: Tensor
    """[N] number of its crop in the batch (a tower row, or one picture of a packed tower)."""
    frame: Tensor
    """[N] 0 for stills."""
    grid_row: Tensor
    grid_col: Tensor
    """[N] place on the grid of its crop, in visual tokens."""
    newline: Tensor
    """[N] bool: a separator that no patch stands behind."""
    patches: Tensor
    """[N, m] flat numbers (crop * patches per crop + patch, or the row of a packed tower) of its patches; -1 none."""
    grid: Tensor
    """[crops, 2] height and width in visual tokens."""
    crop_image: Tensor
    """[crops] the image of each crop."""
    total_patches: int = 0

    def __len__(self) -> int:
        return len(self.image)

    def to(self, device: torch.device) -> Layout:
        return Layout(**{k: v.to(device) if isinstance(v, Tensor) else v for k, v in vars(self).items()})
