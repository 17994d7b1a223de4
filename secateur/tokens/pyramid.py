"""A picture as a pyramid of levels, each cut into tiles of one size: how it is made, and how it is laid out in a prompt.

The coarsest level is one tile, a thumbnail; the model takes the tiles as pictures or crops, level by level.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from secateur.errors import SecateurError
from secateur.families.vlm import Layout
from secateur.utils.screen import Screen


@dataclass(frozen=True)
class Level:
    """One level: `rows` x `cols` tiles, and the `height` x `width` pixels that the picture takes of them, from the top left.

    >>> Level(2, 3, 672, 1008)
    Level(rows=2, cols=3, height=672, width=1008)

    Sizes of 0 (not known) leave the whole grid to the picture.
    """

    rows: int
    cols: int
    height: int = 0
    width: int = 0

    def map(self, rows: int, cols: int) -> tuple[int, int]:
        """Rows and columns that the picture takes of a map of so many: padding lies at the bottom or the right."""
        if not (self.height and self.width):
            return rows, cols
        if self.width / self.height > cols / rows:
            return self.height * cols // self.width, cols
        return rows, self.width * rows // self.height


@dataclass(repr=False)
class Pyramid(Screen):
    """What `pyramid` makes of a picture."""

    tiles: Tensor
    """[n, 3, block, block], level by level, the thumbnail first, each row by row."""
    levels: list[Level]


def scales(height: int, width: int, block: int = 336, base: int = 3) -> list[float]:
    """The scales of a picture's levels, ascending: the thumbnail's, `base` blocks on the long side, ..., 1.

    >>> [round(s, 3) for s in scales(4000, 6000)]
    [0.056, 0.168, 0.25, 0.5, 1.0]

    Halves from 1 down to the base, and the base itself. A picture of no more than `block` pixels has the thumbnail alone.
    """
    _check(height, width, block, base)
    thumbnail = min(block / height, block / width)
    if max(height, width) <= block:
        return [thumbnail]
    least = min(1.0, base * block / max(height, width))
    found = [1.0]
    while found[-1] / 2 >= least:
        found.append(found[-1] / 2)
    return sorted({*found, least, thumbnail})


def levels(
    height: int, width: int, block: int = 336, *, base: int = 3, scales_of: Sequence[float] | None = None
) -> list[Level]:
    """The levels of a picture, coarse to fine; see `pyramid`.

    >>> [(level.rows, level.cols) for level in levels(1024, 1024)]
    [(1, 1), (3, 3), (4, 4)]
    """
    _check(height, width, block, base)
    thumbnail = min(block / height, block / width)
    chosen = (
        scales(height, width, block, base)
        if scales_of is None
        else sorted({*map(float, scales_of), thumbnail})
    )
    made = []
    for scale in chosen:
        h, w = round(height * scale), round(width * scale)
        if min(h, w) < 1:
            raise SecateurError(
                f"a picture of {height} x {width} pixels would be {h} x {w} at a scale of {scale:.3g}",
                where="pyramid",
                fix="cut the long side into several pictures first",
            )
        tiles = (1, 1) if scale == thumbnail else (math.ceil(h / block), math.ceil(w / block))
        fill = min(block * tiles[0] / h, block * tiles[1] / w)
        made.append(Level(*tiles, round(h * fill), round(w * fill)))
    return made


def pyramid(
    picture: Tensor, block: int = 336, *, base: int = 3, scales_of: Sequence[float] | None = None
) -> Pyramid:
    """A picture [3, H, W] as tiles of `block` pixels, in its own dtype.

    >>> made = pyramid(torch.zeros(3, 512, 512, dtype=torch.uint8), 64)
    >>> made.tiles.shape, [(level.rows, level.cols) for level in made.levels]
    (torch.Size([90, 3, 64, 64]), [(1, 1), (3, 3), (4, 4), (8, 8)])

    Args:
        picture: uint8 or floating.
        block: pixels on the side of a tile: what the vision tower takes.
        base: blocks on the long side of the level above the thumbnail.
        scales_of: in place of the halves, such as (0.25, 1); the thumbnail is added.

    Returns:
        The tiles and levels. Each level is resized from the picture (bilinear), as large as its tiles allow, and zeros pad the
        bottom or the right.

    Raises:
        SecateurError: a picture, block or scale that leaves nothing to see. Source: LRS-DIP, arXiv 2503.07588.
    """
    if picture.dim() != 3 or len(picture) != 3:
        raise SecateurError(
            f"the picture is {list(picture.shape)}", where="pyramid", fix="[3, height, width]"
        )
    found = levels(picture.shape[1], picture.shape[2], block, base=base, scales_of=scales_of)
    tiles = []
    for level in found:
        high, wide = block * level.rows, block * level.cols
        made = F.interpolate(
            picture[None].float(), (level.height, level.width), mode="bilinear", align_corners=False
        )[0]
        made = F.pad(made, (0, wide - level.width, 0, high - level.height))
        made = made if picture.is_floating_point() else made.round()
        cut = made.view(3, level.rows, block, level.cols, block).permute(1, 3, 0, 2, 4)
        tiles.append(cut.reshape(-1, 3, block, block).to(picture.dtype))
    return Pyramid(torch.cat(tiles), found)


def _check(height: int, width: int, block: int, base: int) -> None:
    if min(height, width, block, base) < 1:
        raise SecateurError(
            f"{height} x {width} pixels in blocks of {block}, {base} on the base's long side, are no tiles",
            where="pyramid",
            fix="numbers from 1 on",
        )


def levels_of(pyramids: Pyramid | Sequence[Pyramid | Sequence[Level]], count: int) -> list[list[Level]]:
    """The levels of each of the pyramids that `count` tiles belong to; one pyramid alone is that of every picture."""
    if isinstance(pyramids, Pyramid):
        pyramids = [pyramids] * max(1, count // max(1, len(pyramids.tiles)))
    return [list(each.levels if isinstance(each, Pyramid) else each) for each in pyramids]


def regroup(layout: Layout, pyramids: Pyramid | Sequence[Pyramid | Sequence[Level]]) -> Layout:
    """A layout of pictures that are tiles of pyramids: each pyramid is an image, each tile a crop of it.

    >>> regroup(layout, [[Level(1, 1), Level(2, 2)]])  # doctest: +SKIP

    The tiles come in the order of the levels as given, row by row; level 0 is the one of fewest tiles. One pyramid alone is that
    of every picture. Raises `SecateurError` where the numbers don't match.
    """
    count, every = len(layout.grid), levels_of(pyramids, len(layout.grid))
    for levels in every:
        if not levels or any(min(level.rows, level.cols) < 1 for level in levels):
            raise SecateurError(
                f"the grids {[(level.rows, level.cols) for level in levels]} have a level without tiles",
                where="pyramid",
                fix="a thumbnail of (1, 1) and finer levels",
            )
    need = sum(level.rows * level.cols for levels in every for level in levels)
    if need != count or not bool((layout.crop_image == torch.arange(count)).all()):
        raise SecateurError(
            f"the pyramids have {need} tiles, and {count} pictures came",
            where="pyramid",
            fix="give every tile as a picture of its own, level by level, and nothing else",
        )
    side = layout.grid[0]
    if bool((layout.grid != side).any()) or not int(side.min()):
        raise SecateurError("its tiles aren't maps of one size", where="pyramid")
    image, level, tile, end = [], [], [], []
    for number, levels in enumerate(every):
        rank = sorted(range(len(levels)), key=lambda i: levels[i].rows * levels[i].cols)
        for i, each in enumerate(levels):
            n = each.rows * each.cols
            image += [number] * n
            level += [rank.index(i)] * n
            tile += [(r, c) for r in range(each.rows) for c in range(each.cols)]
            end += [each.map(each.rows * int(side[0]), each.cols * int(side[1]))] * n
    crop_image, places = torch.tensor(image), torch.tensor(tile)[layout.crop]
    whole = places * side + torch.stack([layout.grid_row, layout.grid_col], 1)
    padding = (whole >= torch.tensor(end)[layout.crop]).any(1)
    return dataclasses.replace(
        layout,
        image=crop_image[layout.crop],
        crop_image=crop_image,
        whole=whole,
        level=torch.tensor(level)[layout.crop].masked_fill(padding, -1),
        tile=places,
    )


def voted(
    chosen: Tensor,
    places: Tensor,
    size: tuple[int, int],
    tiles: tuple[int, int],
    most: int = 0,
    weights: Tensor | None = None,
) -> Tensor:
    """bool [tiles]: the tiles of the next level that tokens of this one lie on.

    >>> places = torch.tensor([[1, 3], [1, 4], [2, 3]])
    >>> voted(torch.tensor([True, True, False]), places, (4, 7), (3, 5)).nonzero()[:, 0].tolist()
    [2]

    `chosen` [n] bool, with `places` [n, 2] on a map of `size`; `tiles`: rows and columns of the next level. `most`: how many
    may win, 0 all; those with most votes, or with the largest sum of `weights` [n], the first of equal ones.
    """
    row, col = (places[chosen, axis] * tiles[axis] // size[axis] for axis in (0, 1))
    number = row * tiles[1] + col
    votes = torch.zeros(tiles[0] * tiles[1], dtype=torch.float64, device=chosen.device)
    each = torch.ones_like(number, dtype=torch.float64) if weights is None else weights[chosen].double()
    votes.index_add_(0, number, each)
    won = torch.bincount(number, minlength=len(votes)) > 0
    if most and int(won.sum()) > most:
        best = votes.masked_fill(~won, -torch.inf).argsort(descending=True, stable=True)[:most]
        won = torch.zeros_like(won)
        won[best] = True
    return won
