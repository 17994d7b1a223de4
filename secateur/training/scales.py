"""The scales of BatchNorms: which units they belong to, which fall below a threshold, what coupled
layers agree on, and the penalty that brings them to zero."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from secateur.errors import SecateurError
from secateur.graph import Group
from secateur.pruning.context import Context
from secateur.training.state import State
from secateur.utils.screen import Screen

PENALTIES = ("l1", "l2", "smooth-l1")


def batchnorm_scales(model: nn.Module) -> dict[str, nn.Parameter]:
    """The scale of every BatchNorm that has one, by parameter name.

    Raises `SecateurError` where there is none.
    """
    scales = {
        f"{path}.weight".lstrip("."): module.weight
        for path, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine
    }
    if not scales:
        raise SecateurError(
            "it has no BatchNorm with scales",
            where=type(model).__name__,
            fix="use another method, such as lottery-ticket or group-magnitude",
        )
    return scales


def coupled_scales(context: Context, scales: Mapping[str, nn.Parameter]) -> dict[str, Group]:
    """The groups that can be cut and have BatchNorm scales.

    Raises `SecateurError` where there is none.
    """
    found = {g.name: g for g in context.groups if any(s.name in scales for s in g.slices)}
    if not found:
        raise SecateurError("no BatchNorm's channels can be cut", where="model", fix="see secateur inspect")
    return found


def gammas(group: Group, scales: Mapping[str, nn.Parameter]) -> Tensor:
    """|gamma| of each BatchNorm of a group, [members, units]; the largest, where a unit has several channels."""
    rows = [
        scales[s.name].detach().abs().float()[s.index.to(scales[s.name].device)].amax(1)
        for s in group.slices
        if s.name in scales
    ]
    return torch.stack(rows)


def of_layers(
    members: Mapping[str, Group], units: Mapping[str, Tensor], scales: Mapping[str, nn.Parameter]
) -> dict[str, Tensor]:
    """The mask of each BatchNorm, bool [C], from those of the groups; a layer that loses nothing has none."""
    keep: dict[str, Tensor] = {}
    for name, group in members.items():
        gone = ~units[name].cpu()
        for part in group.slices:
            if part.name in scales and gone.any():
                mask = keep.setdefault(part.name, torch.ones(len(scales[part.name]), dtype=torch.bool))
                mask[part.index[gone].flatten()] = False
    return {name: mask.to(scales[name].device) for name, mask in keep.items()}


def ot_threshold(gamma: Tensor, share: float = 1e-4, least: float = 1e-3) -> float:
    """The "OT" threshold of a layer: as many of the smallest |gamma| [C] leave as hold `share` of the sum of squares.

    >>> round(ot_threshold(torch.tensor([0.001, 0.002, 0.004, 0.5, 0.8, 0.9])), 3)
    0.252

    The mean of the last that leaves and the first that stays; 0 where none may, 1 where the largest is below `least`.
    """
    sizes = gamma.detach().abs().double().clamp_min(1e-18).sort().values
    if sizes[-1] < least:
        return 1.0
    removed = int((sizes.square().cumsum(0) <= share * sizes.square().sum()).sum())
    return ((sizes[removed - 1] + sizes[removed]) / 2).item() if removed else 0.0


def above(gamma: Tensor, threshold: float) -> Tensor:
    """Which channels stay, bool [C]: |gamma| above the threshold, and at least the (first) largest."""
    sizes = gamma.detach().abs()
    keep = sizes > threshold
    keep[sizes.argmax()] = True
    return keep


def vote(keep: Tensor, gammas: Tensor | None = None) -> Tensor:
    """The mask that members of a coupled group share, bool [C], from their own, bool [members, C].

    >>> vote(torch.tensor([[1, 1, 0, 0, 1], [1, 0, 0, 1, 1], [1, 0, 0, 0, 1]]).bool()).int()
    tensor([1, 0, 0, 0, 1], dtype=torch.int32)

    Those channels leave on which most members agree, as many members as leave no fewer channels than the member that
    gives up fewest. Where all would leave, the one with the fewest votes stays, then of the largest |gamma| [members, C].
    """
    counts = (~keep).sum(0)
    least = int((~keep).sum(1).min())
    agreed = next(i for i in range(len(keep), -1, -1) if i == 0 or int((counts >= i).sum()) >= least)
    gone = counts >= max(agreed, 1) if least else torch.zeros_like(keep[0])
    if gone.all():
        sizes = gammas.detach().abs().double().sum(0) if gammas is not None else torch.zeros(len(gone))
        fewest = counts == counts.min()
        gone[sizes.masked_fill(~fewest, -1.0).argmax()] = False
    return ~gone


def separation(
    scales: Mapping[str, nn.Parameter], keep: Mapping[str, Tensor], below: float = 0.01
) -> dict[str, float]:
    """How well the scales have parted: the largest |gamma| that leaves, the smallest that stays, the share below 0.01."""
    gone = [scales[name].detach()[~mask].abs() for name, mask in keep.items()]
    stay = [
        gamma.detach()[keep[name]].abs() if name in keep else gamma.detach().abs()
        for name, gamma in scales.items()
    ]
    if not gone:
        return {}
    leaving, staying = torch.cat(gone), torch.cat(stay)
    return {
        "largest_gamma_that_leaves": leaving.max().item(),
        "leaving_below_0.01": (leaving < below).double().mean().item(),
        "smallest_gamma_that_stays": staying.min().item(),
    }


def as_masks(groups: Mapping[str, Group], kept: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Bool [units] by group name from the numbers of the units that stay; a group that isn't named stays whole."""
    masks = {name: torch.ones(group.size, dtype=torch.bool) for name, group in groups.items()}
    for name in masks.keys() & kept.keys():
        masks[name].fill_(False)[kept[name].cpu()] = True
    return masks


@torch.no_grad()
def penalty_gradient(gamma: Tensor, kind: str = "l1", lr_lambda: float = 0.0) -> Tensor:
    """The derivative of the penalty on BatchNorm scales [C]: sign(gamma), gamma, or gamma where |gamma| < lr_lambda.

    >>> penalty_gradient(torch.tensor([0.9, -0.02, 0.0]))
    tensor([ 1., -1.,  0.])
    """
    if kind == "l2":
        return gamma.clone()
    if kind == "smooth-l1":
        return torch.where(gamma.abs() < lr_lambda, gamma, gamma.sign())
    return gamma.sign()


@dataclass(repr=False)
class Sparsify(Screen):
    """A hook on the gradients: lambda times the penalty's derivative joins them for the scales that will leave."""

    scales: Mapping[str, nn.Parameter]
    keep: Mapping[str, Tensor]
    """Bool [C] by name; a name that is missing keeps every channel."""
    lam: float
    kind: str = "l1"

    @torch.no_grad()
    def __call__(self, state: State) -> None:
        for name, gamma in self.scales.items():
            if name not in self.keep or gamma.grad is None:
                continue
            leaves = (~self.keep[name]).to(gamma.device, gamma.dtype)
            gamma.grad.add_(self.lam * penalty_gradient(gamma, self.kind, state.lr * self.lam) * leaves)
