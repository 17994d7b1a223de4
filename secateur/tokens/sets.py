"""The visual tokens of one run of a model: a table of where each came from, which are left, and how they form sets."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from secateur.errors import SecateurError, choose
from secateur.families.vlm import Facts, Layout
from secateur.tokens.budget import counts
from secateur.tokens.state import Reduction, Source, TokenSets

SCOPES = ("crop", "image", "row")


@dataclass(eq=False)
class Table:
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
    column: Tensor
    """In the given input_ids."""
    visual: int
    """N."""
    rows: int
    alive: Tensor = field(init=False)
    slot: Tensor = field(init=False)
    carried: dict[str, Tensor] = field(default_factory=dict)

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

    def keys(self, scope: str) -> Tensor:
        choose(scope, SCOPES, what="scope", where="tokens")
        return {"crop": self.crop_id, "image": self.image_id, "row": self.row}[scope]


def make_table(layouts: dict[str, Layout], places: dict[str, tuple[Tensor, Tensor]], rows: int) -> Table:
    """From layouts and where the placeholders are, by kind: (row, column), each [N], in the order of the features."""
    parts: dict[str, list[Tensor]] = {}
    crops = images = patches = 0
    device = next(iter(places.values()))[0].device
    width = max(layout.patches.shape[1] for layout in layouts.values())

    def add(**values: Tensor) -> None:
        for key, value in values.items():
            parts.setdefault(key, []).append(value)

    lost: list[dict[str, Tensor]] = []
    for kind, layout in layouts.items():
        layout = layout.to(device)
        row, column = places[kind]
        m = layout.patches.shape[1]
        pad = torch.full((len(layout), width - m), -1, device=device)
        shifted = torch.where(layout.patches >= 0, layout.patches + patches, -1)
        add(
            row=row,
            column=column,
            image_id=layout.image + images,
            crop_id=layout.crop + crops,
            frame=layout.frame,
            grid_row=layout.grid_row,
            grid_col=layout.grid_col,
            newline=layout.newline,
            patches=torch.cat([shifted, pad], 1),
            grid=layout.grid[layout.crop],
            whole=torch.stack([layout.grid_row, layout.grid_col], 1)
            if layout.whole is None
            else layout.whole,
        )
        used = torch.zeros(layout.total_patches, dtype=torch.bool, device=device)
        used[layout.patches[layout.patches >= 0]] = True
        if not bool(used.all()):
            free = (~used).nonzero()[:, 0]
            size = layout.grid.prod(1)
            bounds = size.cumsum(0)
            crop = torch.searchsorted(bounds, free, right=True)
            inside = free - (bounds - size)[crop]
            owner = torch.zeros(int(layout.image.max()) + 1, dtype=torch.int64, device=device)
            owner[layout.image] = row
            image = layout.crop_image[crop]
            wide = layout.grid[crop, 1]
            lost.append(
                {
                    "row": owner[image],
                    "column": torch.full_like(free, -1),
                    "image_id": image + images,
                    "crop_id": crop + crops,
                    "frame": torch.zeros_like(free),
                    "grid_row": inside // wide,
                    "grid_col": inside % wide,
                    "newline": torch.zeros_like(free, dtype=torch.bool),
                    "patches": torch.cat(
                        [(free + patches)[:, None], torch.full((len(free), width - 1), -1, device=device)], 1
                    ),
                    "grid": layout.grid[crop],
                    "whole": torch.stack([inside // wide, inside % wide], 1),
                }
            )
        crops += len(layout.grid)
        images += len(layout.crop_image.unique())
        patches += layout.total_patches
    joined = {key: torch.cat(value) for key, value in parts.items()}
    order = (
        joined["row"] * (int(joined["column"].max()) + 1 if len(joined["row"]) else 1) + joined["column"]
    ).argsort()
    joined = {key: value[order] for key, value in joined.items()}
    visual = len(order)
    row = joined["row"]
    first = torch.searchsorted(row, torch.arange(rows, device=device))
    number = torch.arange(visual, device=device) - first[row]
    for part in lost:
        joined = {key: torch.cat([value, part[key]]) for key, value in joined.items()}
    number = torch.cat([number, torch.full((len(joined["row"]) - visual,), -1, device=device)])
    image = _within(joined["image_id"], joined["row"])
    crop = _within(joined["crop_id"], joined["image_id"])
    values: dict[str, Any] = {**joined, "image": image, "crop": crop, "number": number}
    return Table(visual=visual, rows=rows, **values)


def _within(inner: Tensor, outer: Tensor) -> Tensor:
    """Numbers of `inner` counted anew in each `outer`."""
    if not len(inner):
        return inner
    first = torch.full((int(outer.max()) + 1,), int(inner.max()) + 1, device=inner.device)
    first = first.scatter_reduce(0, outer, inner, "amin")
    return inner - first[outer]


@dataclass(eq=False)
class Place:
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
    target: float,
    generator: torch.Generator,
    facts: Facts,
    given: dict[str, Any],
    source: Source,
    kind: str,
) -> TokenSets | None:
    """Groups `members` [M] of the table, which have `features` [M, D], into sets. None where there are none.

    `universe`: the members before any stage, from which the shares are counted.
    """
    device = features.device
    if not len(members):
        return None
    keys = table.keys(scope)
    groups, which = keys[members].unique(return_inverse=True)
    size = torch.bincount(which, minlength=len(groups))
    order = which.argsort(stable=True)
    start = size.cumsum(0) - size
    inside = torch.arange(len(members), device=device) - start[which[order]]
    at = torch.full((len(groups), int(size.max())), -1, device=device)
    at[which[order], inside] = order
    valid = at >= 0
    safe = at.clamp(min=0)
    member = members[safe]

    def token(values: Tensor, fill: int | bool = -1) -> Tensor:
        return values[member].masked_fill(~valid, fill)

    full = torch.bincount(keys[universe], minlength=int(keys.max()) + 1)
    total = full[groups]
    first = member[:, 0]

    def single(values: Tensor) -> Tensor:
        same = (values[member] == values[first][:, None]) | ~valid
        return torch.where(same.all(1), values[first], -1)

    crop = single(table.crop_id)
    spans = (crop < 0)[:, None]
    wanted = target if keep is None else keep
    share = counts(total, wanted, table.image_id[first] if scope != "row" else None)
    if scope == "row" and isinstance(wanted, int):
        pairs = torch.stack([table.row[universe], table.image_id[universe]], 1).unique(dim=0)
        images = torch.bincount(pairs[:, 0], minlength=table.rows)
        share = torch.minimum(wanted * images[groups], total)
    apart = scope == "crop" or kind == "encoder"
    member_or_none = torch.where(valid, member, -1)
    return TokenSets(
        features=features[safe].masked_fill(~valid[..., None], 0)
        if not bool(valid.all())
        else features[safe],
        valid=valid,
        keep=torch.minimum(share, size),
        total=total,
        index=token(table.number),
        row=table.row[first],
        image=single(table.image).masked_fill(single(table.image_id) < 0, -1),
        crop=torch.where(crop < 0, -1, table.crop[first]),
        frame=single(table.frame),
        grid_row=token(table.grid_row if apart else table.whole[:, 0]),
        grid_col=token(table.grid_col if apart else table.whole[:, 1]),
        image_of=token(table.image),
        crop_of=token(table.crop),
        newline=token(table.newline, False),
        grid=table.grid[first].masked_fill(spans, 0),
        generator=generator,
        facts=facts,
        carried={
            name: values[member].masked_fill(~valid, torch.nan) for name, values in table.carried.items()
        },
        given=given,
        source=source,
        place=Place(member_or_none, at, kind),
    )


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


@dataclass(eq=False)
class Outcome:
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


def resolve(sets: TokenSets, reduction: Reduction, handed: int, features: Tensor) -> Outcome:
    """Kept places ascending; in each set they are dealt to its tokens in the order of emission."""
    device = features.device
    at = sets.place.at
    keep = torch.ones(handed, dtype=torch.bool, device=device)
    keep[at[at >= 0]] = False
    source = torch.arange(handed, device=device)
    good = reduction.index >= 0
    chosen = at.gather(1, reduction.index.clamp(min=0))
    slots = chosen.masked_fill(~good, handed).sort(dim=1).values
    many = good.sum(1)
    column = torch.arange(good.shape[1], device=device)
    packed = chosen.gather(1, (~good).to(torch.uint8).argsort(dim=1, stable=True))
    take = column < many[:, None]
    keep[slots[take]] = True
    source[slots[take]] = packed[take]
    replaced = None
    if reduction.features is not None:
        new = features.clone()
        given = reduction.features.gather(
            1, (~good).to(torch.uint8).argsort(dim=1, stable=True)[..., None].expand_as(reduction.features)
        )
        moved = features[source]
        moved[slots[take]] = given[take].to(features.dtype)
        new = moved
        replaced = new[keep]
    return Outcome(keep, source[keep], replaced)
