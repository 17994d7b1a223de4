"""Masks as connectivity: for each pixel, which of its neighbours belong to the same object.

Kampffmeyer et al. 2018, https://arxiv.org/abs/1804.07836; voting of both sides: Yang et al. 2021,
https://arxiv.org/abs/2103.00334.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from secateur.errors import SecateurError

OFFSETS = {
    8: ((-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 1), (1, -1), (1, 0), (1, 1)),
    4: ((-1, 0), (0, -1), (0, 1), (1, 0)),
}
"""(dy, dx) of each channel, by the number of neighbours; the opposite of channel c is the c-th from the end."""


def encode(mask: Tensor, neighbours: int = 8) -> Tensor:
    """bool [..., neighbours, H, W]: whether a pixel and its neighbour are of the same object.

    >>> encode(torch.tensor([[0, 1, 1], [0, 1, 0]]), 4).sum((1, 2))
    tensor([1, 1, 1, 1])

    mask: [..., H, W], bool, or whole numbers: 0 for what is no object, and a number for each object. What lies outside the
    picture is of no object. A pixel without a neighbour of its object leaves no trace. Raises `SecateurError` for floats,
    negative numbers, and another number of neighbours.
    """
    ids = as_mask(mask)
    beside = _shifted(ids, _offsets(neighbours), 0)
    return (ids.unsqueeze(-3) == beside) & (beside > 0)


def mutual(cube: Tensor) -> Tensor:
    """[..., neighbours, H, W]: the probability of each link by both of its pixels, their product; 0 at the border.

    >>> mutual(torch.full((4, 1, 2), 0.5))[:, 0].tolist()
    [[0.0, 0.0], [0.0, 0.25], [0.25, 0.0], [0.0, 0.0]]
    """
    return cube * _partner(cube)


def links(cube: Tensor, threshold: float = 0.5) -> Tensor:
    """bool [..., neighbours, H, W]: the links that both of their pixels say with more than `threshold`."""
    said = cube > threshold
    return said & _partner(said)


def decode(cube: Tensor, threshold: float = 0.5) -> Tensor:
    """bool [..., H, W]: the pixels that are linked to any other.

    >>> mask = torch.tensor([[0, 1, 1], [0, 1, 0], [0, 0, 0]]).bool()
    >>> torch.equal(decode(encode(mask)), mask)
    True

    cube: probabilities, or what `encode` gave. So of a mask all comes back but single pixels.
    """
    return links(cube, threshold).any(-3)


def voted(cube: Tensor) -> Tensor:
    """[..., H, W]: how salient each pixel is, the strongest of its links by both sides."""
    return mutual(cube).amax(-3)


def instances(cube: Tensor, threshold: float = 0.5) -> Tensor:
    """int64 [..., H, W]: objects as pixels that links join, numbered from 1 by their first pixel; 0 is none.

    >>> touching = encode(torch.tensor([[1, 1, 2, 2]]))
    >>> instances(touching)
    tensor([[1, 1, 2, 2]])

    Over links, not over the mask: objects that touch stay apart where no link joins them.
    """
    linked = links(cube, threshold)
    if linked.dim() > 3:
        return torch.stack([instances(one) for one in linked.flatten(0, -4)]).unflatten(0, linked.shape[:-3])
    height, width = linked.shape[1:]
    number = np.arange(height * width).reshape(height, width)
    ends = []
    for there, (dy, dx) in zip(linked.cpu().numpy(), _offsets(len(linked)), strict=True):
        y, x = there.nonzero()
        ends.append((number[y, x], number[y + dy, x + dx]))
    # older scipy reads no other integers, and gives no components without an error
    first, second = (np.concatenate(part).astype(np.int32) for part in zip(*ends))
    graph = coo_array((np.ones(len(first), bool), (first, second)), shape=(height * width,) * 2)
    _, label = connected_components(graph, directed=False)
    label = np.where(linked.any(0).cpu().numpy().ravel(), label, -1)
    kept, where = np.unique(label[label >= 0], return_index=True)
    rank = np.zeros(height * width + 1, np.int64)  # the last is of pixels without a link
    rank[kept[where.argsort()]] = np.arange(1, len(kept) + 1)
    return torch.from_numpy(rank[label].reshape(height, width)).to(cube.device)


def as_mask(mask: Tensor, where: str = "mask") -> Tensor:
    """int64 of the same shape. Raises `SecateurError` for what is no mask: floats, negative numbers, too few axes, no pixel."""
    if not isinstance(mask, Tensor) or mask.dim() < 2 or not mask.numel():
        what = f"a tensor {tuple(mask.shape)}" if isinstance(mask, Tensor) else f"a {type(mask).__name__}"
        raise SecateurError(f"{what} is no mask", where=where, fix="give [..., height, width]")
    if mask.is_floating_point() or mask.is_complex():
        name = str(mask.dtype).removeprefix("torch.")
        raise SecateurError(
            f"its numbers are {name}", where=where, fix="compare with a threshold: mask >= 0.5"
        )
    if (mask < 0).any():
        raise SecateurError(
            f"an object has the number {int(mask.min())}",
            where=where,
            fix="number objects from 1; 0 is no object",
        )
    return mask.long()


def _offsets(neighbours: int) -> tuple[tuple[int, int], ...]:
    if neighbours not in OFFSETS:
        raise SecateurError(f"{neighbours} neighbours", where="neighbours", fix="8 or 4")
    return OFFSETS[neighbours]


def _shifted(x: Tensor, offsets: tuple[tuple[int, int], ...], outside: int) -> Tensor:
    """[..., len(offsets), H, W]: of each pixel the value of its neighbours, `outside` beyond the border."""
    padded = torch.nn.functional.pad(x, (1, 1, 1, 1), value=outside)
    height, width = x.shape[-2:]
    views = [padded[..., 1 + dy : 1 + dy + height, 1 + dx : 1 + dx + width] for dy, dx in offsets]
    return torch.stack(views, -3)


def _partner(cube: Tensor) -> Tensor:
    """What the neighbour in each direction says of the same link; 0 where there is none."""
    offsets = _offsets(cube.shape[-3])
    back = cube.flip(-3)
    padded = torch.nn.functional.pad(back, (1, 1, 1, 1))
    height, width = cube.shape[-2:]
    views = [
        padded[..., c, 1 + dy : 1 + dy + height, 1 + dx : 1 + dx + width]
        for c, (dy, dx) in enumerate(offsets)
    ]
    return torch.stack(views, -3)
