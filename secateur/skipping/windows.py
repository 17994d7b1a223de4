"""Windows of a feature map, shifted or not, and a block that runs on the active ones alone.

B pictures, a map of H x W with C channels, windows of side w with n = w * w places, M = B * H * W / n of them, picture by picture.
Liu et al. 2021, "Swin Transformer", https://arxiv.org/abs/2103.14030, has the shift and its mask.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from secateur.errors import SecateurError

Block = Callable[[Tensor, Tensor | None, Tensor | None], Tensor]
"""(windows [M', n, C], bool [M', n, n] of what may be read or None, policy [M', 1, 1] or None: all 1) -> [M', n, C]."""


def partition(x: Tensor, side: int, shift: int = 0) -> Tensor:
    """[B, H, W, C] -> windows [M, n, C], of the map rolled up and left by `shift`.

    >>> partition(torch.arange(16.0).view(1, 4, 4, 1), 2)[1].flatten().tolist()
    [2.0, 3.0, 6.0, 7.0]
    >>> partition(torch.arange(16.0).view(1, 4, 4, 1), 2, shift=1)[0].flatten().tolist()
    [5.0, 6.0, 9.0, 10.0]

    Raises `SecateurError` where the windows don't divide the map.
    """
    batch, height, width, channels = x.shape
    check_divides(height, width, side)
    if shift:
        x = x.roll((-shift, -shift), (1, 2))
    x = x.view(batch, height // side, side, width // side, side, channels)
    return x.transpose(2, 3).reshape(-1, side * side, channels)


def unpartition(windows: Tensor, height: int, width: int, side: int, shift: int = 0) -> Tensor:
    """What `partition` made, back: [M, n, C] -> [B, H, W, C]."""
    x = windows.view(-1, height // side, width // side, side, side, windows.shape[-1])
    x = x.transpose(2, 3).reshape(-1, height, width, windows.shape[-1])
    return x.roll((shift, shift), (1, 2)) if shift else x


def shift_mask(height: int, width: int, side: int, shift: int, device: torch.device | None = None) -> Tensor:
    """bool [H * W / n, n, n]: which places of a shifted window may be read, those that were neighbours before the roll."""
    regions = []
    for size in (height, width):
        place = torch.arange(size, device=device)
        regions.append((place >= size - side).long() + (place >= size - shift).long() * bool(shift))
    region = regions[0][:, None] * 3 + regions[1]
    number = partition(region[None, ..., None], side)[..., 0]
    return number[:, :, None] == number[:, None]


def window_means(scores: Tensor, side: int, shift: int = 0) -> Tensor:
    """Scores of every place [B, H, W, c] -> their means in each window, float32 [M, c]."""
    return partition(scores.float(), side, shift).mean(1)


def advance(
    block: Block, x: Tensor, policy: Tensor | None, side: int, shift: int = 0, masked: bool = False
) -> Tensor:
    """The map [B, H, W, C] after a block that runs on the windows whose policy [M], of 0 and 1, is 1; the others are left, bit for bit.

    policy: None: all windows, and the block as it is. masked: all windows are computed and the block multiplies what it adds by the policy, so that gradients reach it. Else the
    active windows are gathered, with their rows of the mask of the shift.

    Raises `SecateurError` where the windows don't divide the map, or there are other than M of them.
    """
    height, width = x.shape[1:3]
    windows = partition(x, side, shift)
    mask = shift_mask(height, width, side, shift, x.device) if shift else None
    every = None if mask is None else mask.repeat(len(x), 1, 1)
    if policy is None:
        return unpartition(block(windows, every, None), height, width, side, shift)
    if policy.shape != windows.shape[:1]:
        raise SecateurError(
            f"the policy is {list(policy.shape)}, there are {len(windows)} windows", where="skipping"
        )
    if masked:
        return unpartition(block(windows, every, policy[:, None, None]), height, width, side, shift)
    active = policy.nonzero()[:, 0]
    if not len(active):
        return x
    rows = None if every is None else every[active]
    made = block(windows[active], rows, None)
    return unpartition(windows.index_put((active,), made.to(windows.dtype)), height, width, side, shift)


def check_divides(height: int, width: int, side: int) -> None:
    """Raises `SecateurError` where windows of this side don't divide a map."""
    if side < 1 or height % side or width % side:
        raise SecateurError(
            f"windows of {side} x {side} don't divide a map of {height} x {width}",
            where="skipping",
            fix="pad the picture first, or take another side",
        )
