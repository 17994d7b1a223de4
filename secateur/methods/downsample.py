"""Downsample: average-pool the features to a smaller grid.

No paper. Spec: none.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from secateur.method import register
from secateur.taxonomy import record
from secateur.tokens.grid import rectangle
from secateur.tokens.method import TokenMethod
from secateur.tokens.reduce import best_of_cell, pour
from secateur.tokens.state import Reduction, TokenSets


@register
@dataclass
class Downsample(TokenMethod):
    """Each crop's tokens become means over the cells of a coarser grid: at 25% of an even grid, 2 x 2 average pooling.

    >>> with secateur.attach(vlm, "downsample", target="25%") as attached:  # doctest: +SKIP
    ...     vlm.generate(**inputs)

    The coarse grid has as many cells as it can, at most the target's tokens, with a shape within a factor of two of the
    image's: so the budget is a limit. A mean stands at the place of the token nearest to its cell's middle.
    """

    scope: ClassVar[str] = "crop"
    one_crop: ClassVar[str] = "its coarse grid lies over one crop"
    newlines: ClassVar[str] = "drop"

    info = record("downsample")

    def select(self, sets: TokenSets) -> Reduction:
        cells, centre = torch.zeros_like(sets.index), torch.zeros(sets.valid.shape, device=sets.device)
        for i, (keep, (height, width)) in enumerate(
            zip(sets.keep.tolist(), rectangle(sets.grid_row, sets.grid_col, sets.valid))
        ):
            rows, columns = coarse(height, width, keep)
            place = torch.arange(height * width, device=sets.device)
            row, column = place // width, place % width
            cell_row, cell_column = row * rows // height, column * columns // width
            cells[i, : len(place)] = cell_row * columns + cell_column
            down = (row + 0.5) / height * rows - cell_row - 0.5
            along = (column + 0.5) / width * columns - cell_column - 0.5
            centre[i, : len(place)] = -(down**2 + along**2)
        kept, _ = best_of_cell(centre, cells, sets.valid)
        sums, mass = pour(sets.features, cells, sets.valid)
        means = sums / mass.clamp(min=1)[..., None]
        reduction = Reduction.from_mask(kept)
        at = cells.gather(1, reduction.index.clamp(min=0))
        features = means.gather(1, at[..., None].expand(-1, -1, means.shape[2]))
        return Reduction(reduction.index, features.to(sets.features.dtype))


def coarse(height: int, width: int, keep: int) -> tuple[int, int]:
    """Rows and columns of the coarse grid.

    >>> coarse(24, 24, 144), coarse(24, 24, 288), coarse(24, 24, 58), coarse(1, 9, 3)
    ((12, 12), (16, 18), (7, 8), (1, 3))
    """

    def worth(rows: int) -> tuple[bool, int, float]:
        columns = min(width, keep // rows)
        stretch = abs(math.log(rows / columns * width / height))
        return stretch <= math.log(2) + 1e-9, rows * columns, -round(stretch, 9)

    rows = max(range(1, min(height, keep) + 1), key=worth)
    return rows, min(width, keep // rows)
