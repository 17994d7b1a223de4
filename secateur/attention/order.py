"""Orders of the tokens of a video, so that a block of keys holds neighbours or tokens that are alike.

Each gives places int64: the token that stands at each place. PSA, https://arxiv.org/abs/2512.04025, step 1. Spec: psa.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from secateur.errors import SecateurError

Grid = tuple[int, int, int]
"""Frames, rows and columns of tokens; the column runs fastest."""


def check_grid(grid: tuple[int, ...], where: str = "grid") -> Grid:
    """Raises `SecateurError` for anything but three whole numbers above 0."""
    if len(grid) != 3 or any(not isinstance(size, int) or size < 1 for size in grid):
        raise SecateurError(
            f"{tuple(grid)} isn't frames, rows and columns", where=where, fix="three whole numbers above 0"
        )
    return grid[0], grid[1], grid[2]


def tiles(grid: Grid, tile: Grid = (2, 8, 8)) -> Tensor:
    """Tile after tile, those at the edge cut.

    >>> tiles((1, 2, 4), (1, 2, 2)).tolist()
    [0, 1, 4, 5, 2, 3, 6, 7]
    """
    at = torch.arange(grid[0] * grid[1] * grid[2]).view(grid)
    return torch.cat(
        [
            part.flatten()
            for frames in at.split(tile[0])
            for rows in frames.split(tile[1], 1)
            for part in rows.split(tile[2], 2)
        ]
    )


def gilbert(grid: Grid) -> Tensor:
    """Along a generalised Hilbert curve: each token beside the one before, but for a longer step here and there where a side is odd.

    >>> gilbert((1, 2, 2)).tolist()
    [0, 2, 3, 1]

    Červený's construction for boxes of any size, https://github.com/jakubcerveny/gilbert.
    """
    frames, rows, columns = grid
    x, y, z = (columns, 0, 0), (0, rows, 0), (0, 0, frames)
    if columns >= rows and columns >= frames:
        sides = x, y, z
    elif rows >= columns and rows >= frames:
        sides = y, x, z
    else:
        sides = z, x, y
    path = list(_curve((0, 0, 0), *sides))
    return torch.tensor([(at[2] * rows + at[1]) * columns + at[0] for at in path])


def alike(x: Tensor, clusters: int, rounds: int = 10, generator: torch.Generator | None = None) -> Tensor:
    """Clusters of k-means one after another, each head apart, tokens of one cluster in their order [B, H, N].

    x: [B, H, N, d]; clusters: at most N; rounds: of assigning and averaging, from tokens drawn as the first centres, the same
    ones in all heads and items.
    """
    tokens = x.float().flatten(0, 1)
    count = min(clusters, tokens.shape[1])
    drawn = torch.randperm(tokens.shape[1], generator=generator)[:count].to(x.device)
    centres = tokens[:, drawn]
    for _ in range(rounds):
        labels = _nearest(tokens, centres)
        index = labels[..., None].expand_as(tokens)
        sums = torch.zeros_like(centres).scatter_add_(1, index, tokens)
        held = torch.zeros_like(centres[..., :1]).scatter_add_(
            1, labels[..., None], torch.ones_like(tokens[..., :1])
        )
        centres = torch.where(held > 0, sums / held.clamp(min=1), centres)
    return _nearest(tokens, centres).argsort(dim=-1, stable=True).view(x.shape[:3])


def inverse(places: Tensor) -> Tensor:
    """Where each token stands: `x[places][inverse(places)]` is x. The last dimension is reordered.

    >>> inverse(torch.tensor([2, 0, 1])).tolist()
    [1, 2, 0]
    """
    return places.argsort(-1)


def beside(places: Tensor, text: int, first: bool) -> Tensor:
    """Places of all tokens, where so many of text stand before (first) or behind the others: they go to the end.

    >>> beside(torch.tensor([1, 0]), text=2, first=True).tolist()
    [3, 2, 0, 1]

    places: int64 [..., N] of the others, counted without the text. Gives [..., N + text].
    """
    own = torch.arange(text, device=places.device) + (0 if first else places.shape[-1])
    return torch.cat([places + (text if first else 0), own.expand(*places.shape[:-1], -1)], -1)


def _nearest(tokens: Tensor, centres: Tensor) -> Tensor:
    return (centres.square().sum(-1)[:, None] - 2 * tokens @ centres.transpose(-1, -2)).argmin(-1)


Point = tuple[int, int, int]


def _curve(at: Point, long: Point, deep: Point, high: Point) -> Iterator[Point]:
    """The points of a box with these three sides, along the first of them."""
    w, h, d = (abs(sum(side)) for side in (long, deep, high))
    steps = [(_one(side)) for side in (long, deep, high)]
    for size, step, others in ((w, steps[0], (h, d)), (h, steps[1], (w, d)), (d, steps[2], (w, h))):
        if others == (1, 1):
            for _ in range(size):
                yield at
                at = _plus(at, step)
            return
    half, deep2, high2 = (_half(side) for side in (long, deep, high))
    if _size(half) % 2 and w > 2:
        half = _plus(half, steps[0])
    if _size(deep2) % 2 and h > 2:
        deep2 = _plus(deep2, steps[1])
    if _size(high2) % 2 and d > 2:
        high2 = _plus(high2, steps[2])
    rest = _minus(long, half)
    if 2 * w > 3 * h and 2 * w > 3 * d:  # wide: two halves of the long side
        yield from _curve(at, half, deep, high)
        yield from _curve(_plus(at, half), rest, deep, high)
    elif 3 * h > 4 * d:  # flat: no cut in height
        yield from _curve(at, deep2, high, half)
        yield from _curve(_plus(at, deep2), long, _minus(deep, deep2), high)
        end = _plus(at, _minus(long, steps[0]), _minus(deep2, steps[1]))
        yield from _curve(end, _minus((0, 0, 0), deep2), high, _minus(half, long))
    elif 3 * d > 4 * h:  # thin: no cut in depth
        yield from _curve(at, high2, half, deep)
        yield from _curve(_plus(at, high2), long, deep, _minus(high, high2))
        end = _plus(at, _minus(long, steps[0]), _minus(high2, steps[2]))
        yield from _curve(end, _minus((0, 0, 0), high2), _minus(half, long), deep)
    else:
        back = _minus((0, 0, 0), deep2)
        yield from _curve(at, deep2, high2, half)
        yield from _curve(_plus(at, deep2), high, half, _minus(deep, deep2))
        middle = _plus(at, _minus(deep2, steps[1]), _minus(high, steps[2]))
        yield from _curve(middle, long, back, _minus((0, 0, 0), _minus(high, high2)))
        end = _plus(at, _minus(long, steps[0]), deep2, _minus(high, steps[2]))
        yield from _curve(end, _minus((0, 0, 0), high), _minus(half, long), _minus(deep, deep2))
        last = _plus(at, _minus(long, steps[0]), _minus(deep2, steps[1]))
        yield from _curve(last, back, high2, _minus(half, long))


def _one(side: Point) -> Point:
    return tuple((v > 0) - (v < 0) for v in side)  # type: ignore[return-value]


def _half(side: Point) -> Point:
    return tuple(v // 2 for v in side)  # type: ignore[return-value]


def _size(side: Point) -> int:
    return abs(sum(side))


def _plus(*points: Point) -> Point:
    return tuple(map(sum, zip(*points, strict=True)))  # type: ignore[return-value]


def _minus(a: Point, b: Point) -> Point:
    return tuple(x - y for x, y in zip(a, b, strict=True))  # type: ignore[return-value]
