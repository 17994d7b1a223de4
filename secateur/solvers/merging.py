"""Experts that are merged: which of them join, how their neurons are put in one order, and their weighted mean."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from secateur.errors import SecateurError
from secateur.stats.likeness import Expert


def distances(outputs: Tensor, ratings: Tensor) -> Tensor:
    """[experts, experts]: one less how alike two experts are, in what they give and in how the router rates them.

    >>> distances(torch.eye(2), torch.eye(2))  # at right angles, and as far apart as any two
    tensor([[0.0000, 0.7500],
            [0.7500, 0.0000]])

    outputs: [experts, width]; alike by (cosine + 1) / 2. ratings: [experts, experts] products of the logits of two experts over
    tokens; alike by one less the distance of the logits, scaled to length 1, over the largest such distance. Both count half.
    """
    unit = outputs / outputs.norm(dim=1, keepdim=True).clamp_min(1e-8)
    given = (unit @ unit.T + 1) / 2
    size = ratings.diagonal().clamp_min(0).sqrt().clamp_min(1e-8)
    apart = (2 - 2 * (ratings / size[:, None] / size)).clamp_min(0).sqrt()
    apart.fill_diagonal_(0)
    rated = 1 - apart / apart.max().clamp_min(1e-12)
    found = 1 - (given + rated) / 2
    return found.fill_diagonal_(0)


def join(distance: Tensor, centres: Sequence[int], size: int) -> dict[int, list[int]]:
    """Each centre with the experts that join it: in the centres' order each takes the nearest that are left, `size` with itself.

    >>> join(torch.tensor([[0., 3., 1., 2.], [3., 0., 1., 1.], [1., 1., 0., 9.], [2., 1., 9., 0.]]), [0, 1], 2)
    {0: [2], 1: [3]}

    Raises `SecateurError` where so many can't all join.
    """
    count = len(distance)
    if len(centres) * size < count:
        raise SecateurError(
            f"{len(centres)} groups of {size} don't hold {count} experts",
            where="ream, group_size",
            fix=f"give {-(-count // len(centres))} or more",
        )
    left = [e for e in range(count) if e not in set(centres)]
    joined: dict[int, list[int]] = {}
    for centre in centres:
        near = sorted(left, key=lambda e: float(distance[centre, e]))[: size - 1]
        joined[centre] = near
        left = [e for e in left if e not in near]
    return joined


def directions(experts: Sequence[Tensor], rank: int) -> list[Tensor]:
    """Neurons [neurons, weights] of every expert, scaled to length 1, along the `rank` directions in which they differ most.

    >>> [d.shape for d in directions([torch.randn(6, 40)] * 2, 3)]
    [torch.Size([6, 3]), torch.Size([6, 3])]

    Along each they are multiplied with its singular value. Found by random projections, always the same ones.
    """
    rows = _unit(torch.cat([expert.float() for expert in experts]))
    rows = rows - rows.mean(0, keepdim=True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        _, values, found = torch.pca_lowrank(rows, q=min(rank, *rows.shape))
    return list((rows @ (found * values)).split([len(expert) for expert in experts]))


def order(centre: Sequence[Tensor], other: Sequence[Tensor]) -> Tensor:
    """[neurons]: which neuron of another expert stands for each of the centre's, so that they are near together.

    >>> order([torch.eye(3)], [torch.eye(3)[[2, 0, 1]]])
    tensor([1, 2, 0])

    centre, other: features [neurons, n], as many of both; distances of rows scaled to length 1 are added.
    """
    cost = sum(torch.cdist(_unit(a)[None], _unit(b)[None])[0] for a, b in zip(centre, other, strict=True))
    assert isinstance(cost, Tensor)
    return torch.from_numpy(linear_sum_assignment(cost.double().cpu().numpy())[1])


def shares(saliency: Tensor) -> Tensor:
    """What each of a group's experts counts in their mean: its saliency over their sum.

    >>> shares(torch.tensor([3.0, 1.0]))
    tensor([0.7500, 0.2500])
    """
    return saliency / saliency.sum()


def unused(saliency: Tensor) -> Tensor:
    """Saliencies with those of experts that no token reached raised to the smallest of the others, at most 0.5.

    >>> unused(torch.tensor([0.0, 0.2, 0.9]))
    tensor([0.2000, 0.2000, 0.9000])
    """
    above = saliency[saliency > 0]
    if not len(above):
        return torch.ones_like(saliency)
    return torch.where(saliency > 0, saliency, above.min().clamp_max(0.5))


def _unit(rows: Tensor) -> Tensor:
    return F.normalize(rows.float(), dim=-1, eps=1e-8)


def shortened(experts: list[Expert], rank: int) -> list[list[Tensor]]:
    """For each expert and each kind of its neurons [neurons, rank]: their weights, made shorter."""
    found: list[list[Tensor]] = [[] for _ in experts]
    for kind in range(len(experts[0].neurons)):
        rows = [
            torch.cat(
                [
                    e.tensors[s.name].movedim(s.dim, 0)[s.index.to(e.tensors[s.name].device)].flatten(1)
                    for s in e.neurons[kind]
                ],
                1,
            )
            for e in experts
        ]
        for own, short in zip(found, directions(rows, rank), strict=True):
            own.append(short)
    return found


def average(experts: list[Expert], features: list[list[Tensor]], weights: Tensor) -> dict[str, Tensor]:
    """The first expert and the others as one, by name: neurons in the first's order, then the mean by `weights`.

    features: for each expert what its neurons are told by, once for each kind of them and then again: [neurons, n].

    >>> average([first, second], [[given, short], [given, short]], torch.tensor([3.0, 1.0]))  # doctest: +SKIP
    """
    first, kinds = experts[0], len(experts[0].neurons)
    parts = shares(weights.double()).tolist()
    total = {name: tensor.float() * parts[0] for name, tensor in first.tensors.items()}
    for expert, own, part in zip(experts[1:], features[1:], parts[1:], strict=True):
        tensors = {name: tensor.float() for name, tensor in expert.tensors.items()}
        for kind in range(kinds):
            moved = order(features[0][kind::kinds], own[kind::kinds])
            for here, there in zip(first.neurons[kind], expert.neurons[kind], strict=True):
                before = tensors[there.name]
                places, sources = here.index.flatten(), there.index[moved].flatten()
                device = before.device
                tensors[there.name] = before.index_copy(
                    here.dim, places.to(device), before.index_select(there.dim, sources.to(device))
                )
        for (name, sum_), tensor in zip(list(total.items()), tensors.values(), strict=True):
            total[name] = sum_ + part * tensor
    return {name: sum_.to(first.tensors[name].dtype) for name, sum_ in total.items()}
