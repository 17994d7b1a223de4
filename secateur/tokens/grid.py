"""Places on a grid of tokens: strides, even spreads, rectangles, neighbours. Specs: feather (strided grid), hiprune (neighbours)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from secateur.errors import SecateurError


def strided_grid(grid_row: Tensor, grid_col: Tensor, stride: int) -> Tensor:
    """[S, n] bool: tokens whose row and column are both multiples of `stride`, from the top left; -1 is no place."""
    placed = (grid_row >= 0) & (grid_col >= 0)
    return (grid_row % stride == 0) & (grid_col % stride == 0) & placed


def even_grid(height: int, width: int, keep: int) -> Tensor:
    """Places (row * width + column, ascending) of exactly `keep` tokens spread evenly over a grid: int64 [keep].

    >>> even_grid(4, 4, 4)
    tensor([ 5,  7, 13, 15])

    Rows are taken evenly in a number that makes the spacing as square as it can be; the tokens are divided evenly over
    them, and stand evenly within each.
    """
    keep = min(keep, height * width)
    rows = min(height, max(1, round((keep * height / width) ** 0.5), -(-keep // width)))
    rows = min(rows, max(keep, 1))
    spread = lambda count, size: ((torch.arange(count) + 0.5) * size / max(count, 1)).floor().long()
    edges = [keep * i // rows for i in range(rows + 1)]
    chosen = [row * width + spread(b - a, width) for row, a, b in zip(spread(rows, height), edges, edges[1:])]
    return torch.cat(chosen) if chosen else torch.zeros(0, dtype=torch.int64)


def rectangle(grid_row: Tensor, grid_col: Tensor, valid: Tensor) -> list[tuple[int, int]]:
    """Height and width of the rectangle that each set's tokens fill in raster order; (1, count) where they fill none."""
    shapes = []
    for row, column, count in zip(grid_row, grid_col, valid.sum(1).tolist()):
        row, column, place = row[:count], column[:count], torch.arange(count, device=row.device)
        height, width = len(row.unique()), max(len(column.unique()), 1)
        full = height * width == count and bool(
            (row - row[:1] == place // width).all() and (column - column[:1] == place % width).all()
        )
        shapes.append((height, width) if count and full else (1, count))
    return shapes


def neighbours(mask: Tensor, places: Tensor, width: Tensor, height: Tensor, edges: str = "clip") -> Tensor:
    """`mask` and the tokens left, right, above and below of it on their grid, [S, n] bool.

    `places` [S, n] int64: row * width + column of every token, -1 for none; `width`, `height` [S]. `edges`: "clip" stops at the
    grid's border; "wrap" counts on flat places, so the right edge's neighbour is the next row's first, and clamps what
    falls outside to the first and last place (as HiPrune's code does). A place whose token is gone is passed over.
    """
    if edges not in ("clip", "wrap"):
        raise SecateurError(f"there is no rule {edges!r} for edges", where="neighbours", fix="clip or wrap")
    width, last = width[:, None], (width * height)[:, None] - 1
    taken = torch.zeros(len(mask), int(last.max()) + 2, dtype=torch.bool, device=mask.device)
    column = places % width.clamp(min=1)
    there = mask & (places >= 0)
    steps = (
        (0, True),
        (-1, column > 0),
        (1, column < width - 1),
        (-width, places >= width),
        (width, places + width <= last),
    )
    for step, inside in steps:
        at = (places + step).clamp(min=0).minimum(last) if edges == "wrap" else places + step
        who = there if edges == "wrap" else there & inside
        taken.scatter_(1, at.masked_fill(~who, taken.shape[1] - 1), True)
    taken[:, -1] = False
    return mask | taken.gather(1, places.masked_fill(places < 0, taken.shape[1] - 1))


def nearest(grid_row: Tensor, grid_col: Tensor, chosen: Tensor, homes: Sequence[Tensor] = ()) -> Tensor:
    """int64 [S, n]: the nearest chosen token on the grid, of those with the same `homes` (frame, crop) before others; ties: the first.

    >>> nearest(torch.zeros(1, 4), torch.arange(4)[None], torch.tensor([[True, False, False, True]]))
    tensor([[0, 0, 3, 3]])
    """
    places = torch.stack([grid_row, grid_col], 2).double()
    apart = (places[:, :, None] - places[:, None]).square().sum(-1)
    for home in homes:
        apart = apart + (home[:, :, None] != home[:, None]) * (apart.max() + 1)
    return apart.masked_fill(~chosen[:, None], torch.inf).argmin(2)


def cell_means(values: Tensor, height: int, width: int) -> Tensor:
    """The mean of a map [H, W] over each cell of a grid that is laid over it: float64 [height, width].

    >>> cell_means(torch.tensor([[0.0, 0.5, 1.0]]), 1, 2)
    tensor([[0.1667, 0.8333]], dtype=torch.float64)

    Exact for all sizes: what lies on two cells counts in each by the part that lies there. Rounded to nine decimals, so that
    cells that show the same are equal.
    """
    rows, columns = (_parts(size, cells) for size, cells in zip(values.shape, (height, width)))
    return (rows.to(values.device) @ values.double() @ columns.to(values.device).T).round(decimals=9)


def _parts(size: int, cells: int) -> Tensor:
    """[cells, size]: how much of each cell, of a line of `size` that is cut into `cells`, each place fills."""
    edges, place = torch.arange(cells + 1, dtype=torch.float64) * size / cells, torch.arange(size)
    inside = torch.minimum(edges[1:, None], place + 1) - torch.maximum(edges[:-1, None], place)
    return inside.clamp(min=0) * cells / size


def z_order(grid_row: Tensor, grid_col: Tensor) -> Tensor:
    """int64: the place of each token on the curve that goes through a grid quarter by quarter; both below 2^15.

    >>> z_order(torch.tensor([0, 0, 1, 1, 0]), torch.tensor([0, 1, 0, 1, 2])).tolist()
    [0, 1, 2, 3, 4]

    Tokens at even distances on it are spread evenly over any part of the grid.
    """
    bits = range(15)
    return sum(
        (((grid_row >> b & 1) << (2 * b + 1)) + ((grid_col >> b & 1) << 2 * b) for b in bits),
        torch.zeros_like(grid_row),
    )
