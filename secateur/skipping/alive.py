"""Tokens that are alive: a block runs on them alone, and the others stay as they are.

B pictures, N places each, n of them alive at most, D width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from secateur.errors import SecateurError

Block = Callable[[Tensor, Tensor | None], Tensor]
"""(states [B, n, D], bool [B, n] of what may be read, None: everything) -> states [B, n, D]."""


def pack(keep: Tensor, right: bool = False) -> tuple[Tensor, Tensor]:
    """bool [B, L] -> (index [B, L'], bool [B, L']): the kept columns of each row, padded on the left (or right).

    >>> index, valid = pack(torch.tensor([[True, False, True], [False, False, True]]))
    >>> index.tolist(), valid.tolist()
    ([[0, 2], [0, 2]], [[True, True], [False, True]])
    """
    count = keep.sum(1)
    width = int(count.max()) if len(count) else 0
    row, column = keep.nonzero(as_tuple=True)
    place = torch.arange(len(row), device=keep.device) - (count.cumsum(0) - count)[row]
    if not right:
        place = place + (width - count)[row]
    index = torch.zeros(len(keep), width, dtype=torch.int64, device=keep.device)
    valid = torch.zeros_like(index, dtype=torch.bool)
    index[row, place], valid[row, place] = column, True
    return index, valid


def gather_columns(values: Tensor, index: Tensor) -> Tensor:
    """[B, L, D] at index [B, L'] -> [B, L', D]."""
    return values.gather(1, index[..., None].expand(-1, -1, values.shape[-1]))


def put_columns(full: Tensor, short: Tensor, index: Tensor, valid: Tensor) -> Tensor:
    """A copy of full [B, L, D] with short [B, L', D] at index [B, L'] where bool [B, L'] is True; padding is written nowhere.

    >>> full, short = torch.zeros(1, 3, 1), torch.ones(1, 2, 1)
    >>> put_columns(full, short, torch.tensor([[2, 0]]), torch.tensor([[True, False]])).flatten().tolist()
    [0.0, 0.0, 1.0]
    """
    row, slot = valid.nonzero(as_tuple=True)
    return full.index_put((row, index[row, slot]), short[row, slot].to(full.dtype))


def write(canvas: Tensor, values: Tensor, alive: Tensor) -> Tensor:
    """The canvas [B, N, C] with `values` [B, N, C] where tokens [B, N] are alive; what is finished keeps what it had.

    >>> write(torch.zeros(1, 2, 1), torch.ones(1, 2, 1), torch.tensor([[True, False]])).flatten().tolist()
    [1.0, 0.0]
    """
    check_alive(alive, values)
    return torch.where(alive[..., None], values.to(canvas.dtype), canvas)


def advance(block: Block, x: Tensor, alive: Tensor, masked: bool = False) -> Tensor:
    """States [B, N, D] after a block that reads and writes the tokens bool [B, N] that are alive; the others come out as they went in.

    >>> mean = lambda x, keys: x * 0 + x.mean(1, keepdim=True)
    >>> advance(mean, torch.tensor([[[1.0], [3.0], [9.0]]]), torch.tensor([[True, True, False]])).flatten().tolist()
    [2.0, 2.0, 9.0]

    masked: every token is computed and the dead are masked, which differentiates through all of them and costs all of them; else the
    living are gathered, padded to the picture that has most. A block must not mix tokens but where its mask says so: then both
    are equal, and a batch equals its pictures one by one. Where all are alive the block runs as it is, bit for bit.

    Raises `SecateurError` where `alive` isn't bool [B, N].
    """
    check_alive(alive, x)
    if bool(alive.all()):
        return block(x, None)
    if masked:
        return torch.where(alive[..., None], block(x, readable(alive)), x)
    index, valid = pack(alive, right=True)
    if not index.shape[1]:
        return x
    keys = None if bool(valid.all()) else readable(valid)
    return put_columns(x, block(gather_columns(x, index), keys), index, valid)


def additive(keys: Tensor, dtype: torch.dtype) -> Tensor:
    """bool [B, n] of what may be read -> [B, 1, n, n], what attention adds to its logits."""
    low = torch.zeros(keys.shape, dtype=dtype, device=keys.device).masked_fill(~keys, torch.finfo(dtype).min)
    return low[:, None, None].expand(-1, 1, keys.shape[1], -1)


def drawn(positions: Tensor, length: int, generator: torch.Generator) -> Tensor:
    """[B, n] numbers in 0..1 by chance, for methods that are compared with it; gathered and masked passes draw the same.

    >>> whole = drawn(torch.arange(4)[None], 4, torch.Generator().manual_seed(0))
    >>> torch.equal(drawn(torch.tensor([[1, 3]]), 4, torch.Generator().manual_seed(0)), whole[:, [1, 3]])
    True

    positions: int64 [B, n], places of the tokens that are there, of so many. generator: on the CPU.
    """
    every = torch.rand(len(positions), length, generator=generator)
    return every.to(positions.device).gather(1, positions)


def check_alive(alive: Tensor, x: Tensor) -> None:
    """Raises `SecateurError` where `alive` isn't bool [B, N] of the states' [B, N, ...]."""
    if alive.dtype != torch.bool or alive.shape != x.shape[:2]:
        raise SecateurError(
            f"alive is {str(alive.dtype).removeprefix('torch.')} {list(alive.shape)}, the states are {list(x.shape)}",
            where="skipping",
            fix=f"give bool {list(x.shape[:2])}",
        )


def readable(alive: Tensor) -> Tensor:
    """bool [B, n] of what may be read: a picture of which nothing is alive reads everything, since a softmax over nothing is NaN; none of it is written."""
    return alive | ~alive.any(1, keepdim=True)
