"""Tokens by the object that they lie on: masks that the caller gives, and tokens that stand for each object."""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.errors import SecateurError
from secateur.tokens.select import strided
from secateur.tokens.state import TokenSets


def instances_of(sets: TokenSets, who: str) -> Tensor:
    """int64 [S, n]: the first of the masks in `given["instances"]` that a token is in; their number for the background.

    who: the method, for errors. Raises `SecateurError` where a row has no masks, or masks of other sizes.
    """
    masks = sets.given.get("instances")
    fix = 'attach(..., given={"instances": [bool [instances, tokens] for each row]})'
    if masks is None:
        raise SecateurError("there are no instances of the tokens", where=who, fix=fix)
    found = torch.zeros_like(sets.index)
    for one, row, index in zip(found, sets.row.tolist(), sets.index):
        mask = torch.as_tensor(masks[row]) if row < len(masks) else None
        if mask is None or mask.dim() != 2 or mask.shape[1] <= int(index.max()):
            raise SecateurError(
                f"the instances of row {row} are "
                + (
                    "missing" if mask is None else f"{list(mask.shape)}; it has {int(index.max()) + 1} tokens"
                ),
                where=who,
                fix=fix,
            )
        mask = mask.bool().to(sets.device)[:, index.clamp(min=0)]
        background = torch.ones_like(mask[:1]) if len(mask) else mask.new_ones(1, len(index))
        one[:] = torch.cat([mask, background]).to(torch.uint8).argmax(0)
    return found


def shares(sizes: list[int], keep: int) -> list[int]:
    """How many of `keep` tokens each instance gets, by its size: one at least, all in all `keep`, or every token there is.

    >>> shares([18, 9, 9], 10)
    [6, 2, 2]
    """
    total = sum(sizes)
    keep = min(keep, total)
    order = sorted(range(len(sizes)), key=lambda i: -sizes[i])
    taking_part = set(order[:keep])
    found = [max(1, keep * size // total) if i in taking_part else 0 for i, size in enumerate(sizes)]
    while sum(found) > keep:
        found[found.index(max(found))] -= 1
    while sum(found) < keep:
        for i in order:
            if found[i] < sizes[i] and sum(found) < keep:
                found[i] += 1
    return found


def evenly(instance: Tensor, keep: int) -> Tensor:
    """bool [n]: the tokens that stand for instances, evenly along each; `instance` [n] says which each token belongs to."""
    members = [(instance == number).nonzero()[:, 0] for number in instance.unique().tolist()]
    chosen = torch.zeros(len(instance), dtype=torch.bool, device=instance.device)
    for mine, quota in zip(members, shares([len(mine) for mine in members], keep)):
        if quota:
            even = strided(torch.tensor([len(mine)]), torch.tensor([quota]), len(mine))[0]
            chosen[mine[even.to(mine.device)]] = True
    return chosen
