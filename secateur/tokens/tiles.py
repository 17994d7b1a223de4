"""The tower sees some of the crops: those of a pyramid's coarsest level, then of each finer one what a stage asks for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import SecateurError
from secateur.tokens.call import Call
from secateur.tokens.choose import carry, sets_of
from secateur.tokens.record import Recorder
from secateur.tokens.sets import Table
from secateur.tokens.setup import Placed, Setup


def check(setup: Setup, table: Table) -> None:
    """Refuses pictures whose tiles can't go through the tower one by one."""
    model, family = setup.model, setup.family
    why = None
    if family.packed:
        why = "its tower takes the patches of all pictures as one sequence"
    elif family.joins(model) is None:
        why = "where its crops are joined isn't known"
    elif bool((table.tile[: table.visual] < 0).any()):
        why = "it interpolates the tiles of so large a picture together"
    if why is not None:
        raise SecateurError(
            f"tiles of {type(model).__name__} can't be left out: {why}",
            where="tiles",
            fix="a method that chooses no tiles, or fewer of them",
        )


def crops_of(table: Table, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Level [C], tile [C, 2] and image [C] of each of `count` crops; level -1 where no token is."""
    crop, level = table.crop_id[: table.visual], table.level[: table.visual]
    levels = torch.full((count,), -1, device=table.device).scatter_reduce(0, crop, level, "amax")
    tile = torch.zeros(count, 2, dtype=torch.int64, device=table.device)
    image = torch.zeros(count, dtype=torch.int64, device=table.device)
    tile[crop], image[crop] = table.tile[: table.visual], table.image_id[: table.visual]
    return levels, tile, image


def next_tiles(
    call: Call,
    recorder: Recorder | None,
    placed: Placed,
    members: Tensor,
    features: Tensor,
    level: int,
    crops: tuple[Tensor, Tensor, Tensor],
) -> Tensor:
    """bool [crops]: those of the next level that the stage asks for; `members` [M] of the table were read, up to `level`.

    `crops`: as `crops_of` gives them.
    """
    table, (levels, tile, image) = call.table, crops
    finer = levels == level + 1
    mine = torch.isin(table.image_id[members], image[finer])
    sets, _, _ = sets_of(call, recorder, placed, members[mine], features[mine], "tiles", 0)
    wanted = torch.zeros_like(finer)
    if sets is None:
        return wanted
    assert sets.tiles is not None
    sets.reading = level + 1
    grid = sets.tiles[:, level + 1]  # [S, 2]
    answer: Any = placed.stage.select(sets)
    shape = (len(sets), int(grid.prod(1).max()))
    if not isinstance(answer, Tensor) or answer.dtype != torch.bool or tuple(answer.shape) != shape:
        what = (
            f"{answer.dtype} {tuple(answer.shape)}" if isinstance(answer, Tensor) else type(answer).__name__
        )
        raise SecateurError(
            f"it gave {what}, not a bool mask {shape} of the next level's tiles",
            where=placed.label,
            fix="True marks the tiles that are read",
        )
    carry(placed, table, sets)
    owner = table.image_id[sets.place.members[:, 0]]  # [S]
    which = torch.full((int(image.max()) + 1,), -1, device=table.device)
    which[owner] = torch.arange(len(owner), device=table.device)
    asked = finer & (which[image] >= 0)
    own = which[image[asked]]
    wanted[asked] = answer.to(table.device)[own, tile[asked, 0] * grid[own, 1] + tile[asked, 1]]
    return wanted


def pictures_of(kwargs: Mapping[str, Any], chosen: Tensor) -> dict[str, Any]:
    """Arguments of a model, each crop a picture of its own, that hold `chosen` [crops] alone."""
    pixels: Tensor = kwargs["pixel_values"]
    # rows of pictures, in which pictures of zeros are padding
    real = (pixels.flatten(2) != 0).any(-1) if pixels.dim() == 5 else None

    def some(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.dim():
            return value
        if real is not None and value.dim() > 2 and value.shape[:2] == real.shape:
            return value[real][chosen][:, None]
        return value[chosen] if len(value) == len(chosen) else value

    return {name: some(value) for name, value in kwargs.items()}


def together(crop: Tensor, read: Tensor, wanted: Tensor, features: Tensor, new: Tensor) -> Tensor:
    """[M, D] of the tokens on crops that were `read` and those `wanted` [crops], in order; `crop` [N] of every token."""
    there = (read | wanted)[crop]
    out = features.new_empty(int(there.sum()), features.shape[-1])
    before = read[crop][there]
    out[before], out[~before] = features, new
    return out


@contextmanager
def reading(setup: Setup, chosen: Tensor) -> Iterator[None]:
    """Inside, only `chosen` [crops] go through the tower; features of the others are 0."""
    model, count = setup.model, len(chosen)
    tower, joined = model.get_encoder("image"), setup.family.joins(model)

    def some(value: Any) -> Any:
        mine = isinstance(value, Tensor) and value.dim() > 1 and len(value) == count
        return value[chosen] if mine else value

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return tuple(map(some, args)), {name: some(value) for name, value in kwargs.items()}

    def after(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        full = output.new_zeros(count, *output.shape[1:])
        full[chosen] = output
        return full

    handles = [
        tower.register_forward_pre_hook(before, with_kwargs=True),
        joined.register_forward_hook(after),  # type: ignore[union-attr]
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
