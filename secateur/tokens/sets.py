"""The visual tokens of one run of a model: a table of where each came from, which are left, and how they form sets."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import SecateurError, choose
from secateur.families.vlm import Facts, Layout
from secateur.tokens.counts import counts
from secateur.tokens.state import Reduction, Source, TokenSets, no_frames
from secateur.utils.screen import Screen

SCOPES = ("crop", "frame", "image", "row")
BUDGETS = {"frame": "frame", "image": "image", "all": "row"}
"""What shares a budget, as the caller says it -> what competes."""


@dataclass(eq=False, repr=False)
class Table(Screen):
    """T tokens: the N visual tokens of the language model, row by row, then the patches that none of them stands for.

    `alive` [M] are the visual tokens that are left, in the order of the sequence; `slot` [M] says whose place each has
    (its own, unless a method emitted them in another order).
    """

    row: Tensor
    image: Tensor
    crop: Tensor
    frame: Tensor
    grid_row: Tensor
    grid_col: Tensor
    newline: Tensor
    number: Tensor
    """Among the row's visual tokens; -1 for patches without a token."""
    image_id: Tensor
    crop_id: Tensor
    """Over the whole batch."""
    patches: Tensor
    """[T, m] over all patches of the towers; -1 none."""
    grid: Tensor
    """[T, 2] of the token's crop."""
    whole: Tensor
    """[T, 2] place on the picture that the crops of its image make together."""
    level: Tensor
    """Of the token's crop in its image's pyramid; -1 in the padding of a tile."""
    tile: Tensor
    """[T, 2] row and column of the token's crop among the tiles of its level."""
    column: Tensor
    """In the input_ids as given; -1 for patches without a token."""
    visual: int
    """N."""
    rows: int
    alive: Tensor = field(init=False)
    slot: Tensor = field(init=False)
    carried: dict[str, Tensor] = field(default_factory=dict)
    """[T] numbers that a method carries from stage to stage, NaN where it gave none."""

    def __post_init__(self) -> None:
        self.alive = torch.arange(self.visual, device=self.row.device)
        self.slot = self.alive

    def __len__(self) -> int:
        return len(self.row)

    @property
    def device(self) -> torch.device:
        return self.row.device

    def numbers(self) -> list[Tensor]:
        """For each row the numbers of the tokens that are left, ascending."""
        number, row = self.number[self.alive], self.row[self.alive]
        return [number[row == r].sort().values.cpu() for r in range(self.rows)]

    @cached_property
    def levels(self) -> tuple[Tensor, Tensor]:
        """Rows and columns of the tiles, and of the tokens, of each image's levels: [images, levels, 2] each, (0, 0) for none."""
        there = self.level[: self.visual] >= 0
        level, image = self.level[: self.visual][there], self.image_id[: self.visual][there]
        depth, images = int(self.level.max()) + 1, int(self.image_id.max()) + 1
        none, sizes = torch.zeros(images * depth, dtype=torch.int64, device=self.device), []
        for place in (*self.tile.T, *self.whole.T):
            last = place[: self.visual][there] + 1
            sizes.append(none.scatter_reduce(0, image * depth + level, last, "amax").view(images, depth))
        return torch.stack(sizes[:2], 2), torch.stack(sizes[2:], 2)

    def keys(self, scope: str) -> Tensor:
        choose(scope, SCOPES, what="scope", where="tokens")
        if scope != "frame":
            return {"crop": self.crop_id, "image": self.image_id, "row": self.row}[scope]
        if bool((self.frame < 0).any()):
            raise no_frames()
        return self.image_id * (int(self.frame.max()) + 1) + self.frame

    def counts(self, alive: Tensor) -> list[list[dict[str, int]]]:
        """For each row and each frame of its images, how many of its visual tokens are among `alive`, without separators.

        A frame that isn't known is -1.
        """
        mine = ~self.newline[: self.visual]
        where = torch.stack([self.row, self.image, self.frame], 1)[: self.visual]
        places, which = where[mine].unique(dim=0, return_inverse=True)
        there = torch.zeros(self.visual, dtype=torch.bool, device=self.device)
        there[alive] = True
        total = torch.bincount(which, minlength=len(places))
        kept = torch.bincount(which[there[mine]], minlength=len(places))
        rows: list[list[dict[str, int]]] = [[] for _ in range(self.rows)]
        for (row, image, frame), k, n in zip(places.tolist(), kept.tolist(), total.tolist()):
            rows[row].append({"image": image, "frame": frame, "kept": k, "total": n})
        return rows


def make_table(layouts: dict[str, Layout], places: dict[str, tuple[Tensor, Tensor]], rows: int) -> Table:
    """From layouts and where the placeholders are, by kind: (row, column), each [N], in the order of the features."""
    width = max(layout.patches.shape[1] for layout in layouts.values())
    device = next(iter(places.values()))[0].device
    visible: list[dict[str, Tensor]] = []
    hidden: list[dict[str, Tensor]] = []
    crops = images = patches = 0
    for kind, layout in layouts.items():
        layout = layout.to(device)
        # images, crops and patches are counted over all kinds
        start = (images, crops, patches)
        visible.append(_tokens(layout, *places[kind], width, start))
        hidden.append(_patches_without_token(layout, places[kind][0], width, start))
        crops += len(layout.grid)
        images += len(layout.crop_image.unique())
        patches += layout.total_patches
    tokens = {key: torch.cat([part[key] for part in visible]) for key in visible[0]}
    # features come kind by kind; the table goes row by row
    visual = len(tokens["row"])
    if len(layouts) > 1:
        order = (
            tokens["row"] * (int(tokens["column"].max()) + 1 if visual else 1) + tokens["column"]
        ).argsort()
        tokens = {key: value[order] for key, value in tokens.items()}
    first = torch.searchsorted(tokens["row"], torch.arange(rows, device=device))
    number = torch.arange(visual, device=device) - first[tokens["row"]]

    joined = {key: torch.cat([value, *(part[key] for part in hidden)]) for key, value in tokens.items()}
    rest = torch.full((len(joined["row"]) - visual,), -1, device=device)
    values: dict[str, Any] = {**joined, "number": torch.cat([number, rest])}
    # ids go kind by kind, so those of a row's images and videos may lie apart
    near = joined["image_id"]
    if len(layouts) > 1 and len(near):
        near = (joined["row"] * images + near).unique(return_inverse=True)[1]
    values["image"] = _within(near, joined["row"])
    values["crop"] = _within(joined["crop_id"], joined["image_id"])
    return Table(visual=visual, rows=rows, **values)


def _tokens(
    layout: Layout, row: Tensor, column: Tensor, width: int, start: tuple[int, int, int]
) -> dict[str, Tensor]:
    """Columns of the table for the N visual tokens of one kind; `start`: images, crops, patches before it."""
    images, crops, patches = start
    pad = torch.full((len(layout), width - layout.patches.shape[1]), -1, device=row.device)
    place = torch.stack([layout.grid_row, layout.grid_col], 1)
    return {
        "row": row,
        "column": column,
        "image_id": layout.image + images,
        "crop_id": layout.crop + crops,
        "frame": layout.frame,
        "grid_row": layout.grid_row,
        "grid_col": layout.grid_col,
        "newline": layout.newline,
        "patches": torch.cat([torch.where(layout.patches >= 0, layout.patches + patches, -1), pad], 1),
        "grid": layout.grid[layout.crop],
        "whole": place if layout.whole is None else layout.whole,
        "level": torch.zeros_like(row) if layout.level is None else layout.level,
        "tile": torch.zeros_like(place) if layout.tile is None else layout.tile,
    }


def _patches_without_token(
    layout: Layout, row: Tensor, width: int, start: tuple[int, int, int]
) -> dict[str, Tensor]:
    """Columns of the table for patches that no visual token stands for (cut away by unpadding): they leave in the tower too."""
    images, crops, patches = start
    device = row.device
    used = torch.zeros(layout.total_patches, dtype=torch.bool, device=device)
    used[layout.patches[layout.patches >= 0]] = True
    free = (~used).nonzero()[:, 0]
    size = layout.grid.prod(1)
    bounds = size.cumsum(0)
    # with every patch in use there is nothing to look up, and grids of merged patches don't count patches
    crop = torch.searchsorted(bounds, free, right=True)
    inside = free - (bounds - size)[crop]
    owner = torch.zeros(int(layout.image.max()) + 1 if len(layout) else 1, dtype=torch.int64, device=device)
    owner[layout.image] = row
    image = layout.crop_image[crop]
    wide = layout.grid[crop, 1]
    pad = torch.full((len(free), width - 1), -1, device=device)
    return {
        "row": owner[image],
        "column": torch.full_like(free, -1),
        "image_id": image + images,
        "crop_id": crop + crops,
        "frame": torch.zeros_like(free),
        "grid_row": inside // wide,
        "grid_col": inside % wide,
        "newline": torch.zeros_like(free, dtype=torch.bool),
        "patches": torch.cat([(free + patches)[:, None], pad], 1),
        "grid": layout.grid[crop],
        "whole": torch.stack([inside // wide, inside % wide], 1),
        "level": torch.full_like(free, -1),
        "tile": torch.zeros(len(free), 2, dtype=torch.int64, device=device),
    }


def _within(inner: Tensor, outer: Tensor) -> Tensor:
    """Numbers of `inner` counted from 0 within each `outer`."""
    if not len(inner):
        return inner
    first = torch.full((int(outer.max()) + 1,), int(inner.max()) + 1, device=inner.device)
    first = first.scatter_reduce(0, outer, inner, "amin")
    return inner - first[outer]


@dataclass(eq=False, repr=False)
class Place(Screen):
    """Where sets lie: `members` [S, n] rows of the table, `at` [S, n] positions in what was handed in; -1 padding."""

    members: Tensor
    at: Tensor
    kind: str = "input"


def make_sets(
    table: Table,
    members: Tensor,
    features: Tensor,
    *,
    scope: str,
    universe: Tensor,
    keep: float | None,
    target: float | None,
    generator: torch.Generator,
    facts: Facts,
    given: dict[str, Any],
    noted: dict[str, Tensor],
    modules: nn.Module | None,
    source: Source,
    kind: str,
    own: bool = False,
) -> TokenSets | None:
    """Groups `members` [M] of the table, which have `features` [M, D], into sets. None where there are none.

    `universe`: the members before any stage, from which the shares are counted. `own`: a count is every set's own.
    """
    if not len(members):
        return None
    keys = table.keys(scope)
    groups, which = keys[members].unique(return_inverse=True)
    at = _padded(which, len(groups))  # [S, n]
    valid = at >= 0
    safe = at.clamp(min=0)
    member = members[safe]
    first = member[:, 0]
    size = valid.sum(1)
    total = torch.bincount(keys[universe], minlength=int(keys.max()) + 1)[groups]
    amount = keep if keep is not None else 1.0 if target is None else target

    asked = counts(total, amount) if own else _share(table, universe, scope, amount, total, groups, first)
    # crops that compete alone, and patches in the tower, lie on their crop's own grid
    apart = scope == "crop" or kind == "encoder"
    sets = TokenSets(
        features=features[safe] if bool(valid.all()) else features[safe].masked_fill(~valid[..., None], 0),
        valid=valid,
        keep=torch.minimum(asked, size),
        asked=asked,
        total=total,
        **_columns(table, member, valid, apart),
        generator=generator,
        facts=facts,
        target=target,
        given=given,
        noted=noted,
        modules=modules,
        source=source,
        place=Place(torch.where(valid, member, -1), at, kind),
    )
    if bool((table.grid[members] == 0).any()):
        sets.forget_places()
    if bool((table.frame[members] < 0).any()):
        sets.forget_frames()
    return sets


def _columns(table: Table, member: Tensor, valid: Tensor, apart: bool) -> dict[str, Any]:
    """What the table says about the tokens [S, n] and about the sets [S]. `apart`: places are those on a token's own crop."""
    first = member[:, 0]

    def token(values: Tensor, fill: bool | float = -1) -> Tensor:
        return values[member].masked_fill(~valid, fill)  # [S, n]

    def single(values: Tensor) -> Tensor:
        """[S] the value of a set's tokens, -1 where they differ."""
        same = (values[member] == values[first][:, None]) | ~valid
        return torch.where(same.all(1), values[first], -1)

    crop = single(table.crop_id)
    pyramid: dict[str, Any] = {"level": token(table.level)}
    if bool((single(table.image_id) >= 0).all()) and bool((table.level > 0).any()):
        tiles, maps = table.levels
        pyramid |= {"tiles": tiles[table.image_id[first]], "maps": maps[table.image_id[first]]}
    return {
        **pyramid,
        "index": token(table.number),
        "row": table.row[first],
        "image": single(table.image).masked_fill(single(table.image_id) < 0, -1),
        "crop": torch.where(crop < 0, -1, table.crop[first]),
        "frame": single(table.frame),
        "grid_row": token(table.grid_row if apart else table.whole[:, 0]),
        "grid_col": token(table.grid_col if apart else table.whole[:, 1]),
        "image_of": token(table.image),
        "crop_of": token(table.crop),
        "frame_of": token(table.frame),
        "newline": token(table.newline, False),
        "grid": table.grid[first].masked_fill((crop < 0)[:, None], 0),
        "carried": {name: token(values, torch.nan) for name, values in table.carried.items()},
    }


def _padded(which: Tensor, groups: int) -> Tensor:
    """Group of each of M tokens -> [S, n] positions of each group's tokens, ascending, -1 padding."""
    size = torch.bincount(which, minlength=groups)
    order = which.argsort(stable=True)
    start = size.cumsum(0) - size
    inside = torch.arange(len(which), device=which.device) - start[which[order]]
    at = torch.full((groups, int(size.max())), -1, device=which.device)
    at[which[order], inside] = order
    return at


def _share(
    table: Table,
    universe: Tensor,
    scope: str,
    amount: float,
    total: Tensor,
    groups: Tensor,
    first: Tensor,
) -> Tensor:
    """[S] how many tokens of each set an amount lets stay: a count is per image, whatever the scope."""
    if scope == "row" and isinstance(amount, int):
        pairs = torch.stack([table.row[universe], table.image_id[universe]], 1).unique(dim=0)
        images = torch.bincount(pairs[:, 0], minlength=table.rows)
        return torch.minimum(amount * images[groups], total)
    return counts(total, amount, table.image_id[first] if scope != "row" else None)


def settle(sets: TokenSets, answer: Any, where: str) -> Reduction:
    """A method's answer, checked: a `Reduction` with positions inside the sets and no repeats.

    Raises `SecateurError` where it isn't one.
    """
    shape = tuple(sets.valid.shape)
    if isinstance(answer, Tensor):
        if answer.dtype != torch.bool or tuple(answer.shape) != shape:
            raise SecateurError(
                f"it gave {answer.dtype} {tuple(answer.shape)}, not a bool mask {shape}",
                where=where,
                fix="True marks the tokens that stay",
            )
        return Reduction.from_mask(answer.to(sets.device) & sets.valid)
    if not isinstance(answer, Reduction):
        raise SecateurError(
            f"it gave {type(answer).__name__}", where=where, fix="give a bool mask or a Reduction"
        )
    index = answer.index
    good = index >= 0
    if index.dim() != 2 or len(index) != shape[0] or bool((index >= shape[1]).any()):
        raise SecateurError(f"its index {tuple(index.shape)} lies outside the sets {shape}", where=where)
    hits = torch.zeros(shape, dtype=torch.int64, device=sets.device)
    hits.scatter_add_(1, index.clamp(min=0), good.long())
    if bool((hits > 1).any()) or bool((hits.bool() & ~sets.valid).any()):
        raise SecateurError("it emitted a token twice, or padding", where=where)
    if answer.features is not None and tuple(answer.features.shape) != (
        *index.shape,
        sets.features.shape[-1],
    ):
        raise SecateurError(
            f"its features are {tuple(answer.features.shape)}, for an index {tuple(index.shape)}", where=where
        )
    return answer


@dataclass(eq=False, repr=False)
class Outcome(Screen):
    """What a stage does to the M tokens that were handed in."""

    keep: Tensor
    """[M] bool: which places stay (tokens outside the sets do)."""
    source: Tensor
    """[kept] position in what was handed in, of the token that takes each kept place."""
    replaced: Tensor | None
    """[kept, D] new features, or None."""

    @property
    def changed(self) -> bool:
        return self.replaced is not None or not bool(self.keep.all()) or self.permuted

    @property
    def permuted(self) -> bool:
        return bool((self.source[1:] < self.source[:-1]).any())


def resolve(sets: TokenSets, reduction: Reduction, features: Tensor) -> Outcome:
    """Kept places ascending; in each set they are dealt to its tokens in the order of emission.

    `features` [M, D] of all tokens that were handed in, also those in no set, which stay.
    """
    handed, device = len(features), features.device
    at = sets.place.at
    keep = torch.ones(handed, dtype=torch.bool, device=device)
    keep[at[at >= 0]] = False
    source = torch.arange(handed, device=device)
    good = reduction.index >= 0  # [S, k]
    chosen = at.gather(1, reduction.index.clamp(min=0))
    # the places ascending, and the tokens in their order, each with the padding at the end
    slots = chosen.masked_fill(~good, handed).sort(dim=1).values
    order = (~good).to(torch.uint8).argsort(dim=1, stable=True)
    packed = chosen.gather(1, order)
    take = torch.arange(good.shape[1], device=device) < good.sum(1)[:, None]
    keep[slots[take]] = True
    source[slots[take]] = packed[take]
    replaced = None
    if reduction.features is not None:
        new = reduction.features.gather(1, order[..., None].expand_as(reduction.features))
        moved = features[source]
        moved[slots[take]] = new[take].to(features.dtype)
        replaced = moved[keep]
    return Outcome(keep, source[keep], replaced)
