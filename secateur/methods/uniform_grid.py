"""Uniform grid: tokens evenly spread over the image, whatever it shows.

No paper. Spec: none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from secateur.method import register
from secateur.taxonomy import record
from secateur.tokens.grid import even_grid, rectangle
from secateur.tokens.method import TokenMethod
from secateur.tokens.state import TokenSets


@register
@dataclass
class UniformGrid(TokenMethod):
    """A strided grid of exactly the target's tokens in each crop, before the language model.

    >>> with secateur.attach(vlm, "uniform-grid", target="25%") as attached:  # doctest: +SKIP
    ...     vlm.generate(**inputs)

    Rows are taken at even distances, as many as make the grid as square as the image; the tokens are divided evenly over
    them and stand at even distances in each. Tokens that don't fill a rectangle are spread along their sequence.
    """

    scope: ClassVar[str] = "crop"
    one_crop: ClassVar[str] = "its grid lies over one crop"
    newlines: ClassVar[str] = "drop"

    info = record("uniform-grid")

    def select(self, sets: TokenSets) -> Tensor:
        mask = torch.zeros_like(sets.valid)
        for i, (keep, (height, width)) in enumerate(
            zip(sets.keep.tolist(), rectangle(sets.grid_row, sets.grid_col, sets.valid))
        ):
            mask[i, even_grid(height, width, keep).to(mask.device)] = True
        return mask
