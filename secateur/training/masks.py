"""Masks of single weights while training: the hook that holds them, magnitude selection, and the controls."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from secateur.errors import SecateurError
from secateur.pruning.checks import check_tensors
from secateur.pruning.select import top_k_rows

if TYPE_CHECKING:
    from secateur.training.state import State

Masks = dict[str, Tensor]
"""Bool masks by parameter name; True stays."""


class Masked:
    """A hook after each step: what a mask removed is zero, now and always. Gradients and moments are left alone.

    >>> fit(model, data, steps=100, after_step=[Masked(model, masks)])  # doctest: +SKIP

    Raises `SecateurError` for a mask of another shape, and for one that empties a layer.
    """

    def __init__(self, model: nn.Module, masks: Mapping[str, Tensor]):
        check_masks(model, masks)
        parameters = dict(model.named_parameters())
        self.parameters: list[Tensor] = [parameters[name] for name in masks]
        self.factors: Any = [masks[name].to(p.device, p.dtype) for name, p in zip(masks, self.parameters)]
        self()

    @torch.no_grad()
    def __call__(self, state: State | None = None) -> None:
        if any(p.shape != factor.shape for p, factor in zip(self.parameters, self.factors)):
            raise SecateurError(
                "the network was cut while masks of its old size are held",
                where="masks",
                fix="cut after the phase",
            )
        if self.parameters:
            torch._foreach_mul_(self.parameters, self.factors)


def check_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Refuse masks of tensors that the model lacks, of other shapes, and those that empty a layer."""
    check_tensors(model, masks, "mask", where="masks", fix="use masks that were made for this model")
    for name, mask in masks.items():
        if mask.numel() and not mask.any():
            raise SecateurError(
                "the mask empties the layer: no weight is left",
                where=name,
                fix="ask for a larger share, prune layer by layer, or skip this layer",
            )


def full_masks(weights: Mapping[str, Tensor]) -> Masks:
    return {name: torch.ones_like(w, dtype=torch.bool) for name, w in weights.items()}


def prune_smallest(
    weights: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    rate: float | Mapping[str, float] | None = None,
    *,
    keep: int | Mapping[str, int] | None = None,
    scope: str = "global",
    skip: Collection[str] = (),
    compat: str | None = None,
) -> Masks:
    """The masks without the smallest of the weights that are still there.

    >>> w = {"fc": torch.tensor([[0.5, -0.1, 0.02], [0.05, -0.9, 0.3]])}
    >>> prune_smallest(w, full_masks(w), 0.2)["fc"].int()
    tensor([[1, 1, 0],
            [0, 1, 1]], dtype=torch.int32)

    rate: share of the survivors that leaves: ceil(rate * survivors) over all tensors with scope "global" (those named
    in `skip` are counted, but lose none), round(rate * survivors), half to even, of each tensor with scope "layer",
    where it may differ by name. keep: how many stay in its place, over all tensors or by name.
    Exactly that many leave; of equal weights the earlier (tensor, then flat index) leaves first.
    compat="open_lth" (or "legacy", of the TensorFlow code, with scope "layer") removes one more and all that equal it:
    whatever isn't above the n-th value, from 0, of the sorted survivors.

    Sources: Frankle & Carbin 2019, arXiv 1803.03635, and its code. Spec: lottery-ticket.
    Raises `SecateurError` where more would leave than there are.
    """
    names = [name for name in weights if name not in skip]
    if scope == "global":
        pools = [names]
    elif scope == "layer":
        pools = [[name] for name in names]
    else:
        raise SecateurError(f"there is no scope {scope!r}", where="prune_smallest", fix="global or layer")
    new = {name: mask.clone() for name, mask in masks.items()}
    for pool in pools:
        present = torch.cat([masks[name].flatten() for name in pool])
        scores = torch.cat([weights[name].detach().flatten().abs().double() for name in pool])
        survivors = int(present.sum())
        if keep is not None:
            counted = 0 if scope == "layer" else sum(int(masks[n].sum()) for n in weights if n in skip)
            wanted = keep[pool[0]] if isinstance(keep, Mapping) else keep
            count = survivors + counted - wanted
        else:
            own = rate[pool[0]] if isinstance(rate, Mapping) else rate or 0.0
            every = sum(int(mask.sum()) for mask in masks.values())
            count = math.ceil(own * every - 1e-9) if scope == "global" else round(own * survivors)
        if count <= 0 and compat is None:
            continue
        if count >= survivors:
            raise SecateurError(
                f"{count} of {survivors} weights would leave",
                where=f"prune_smallest, {pool[0] if scope == 'layer' else 'all layers'}",
                fix="prune a smaller share, or skip fewer layers",
            )
        ranked = scores.masked_fill(~present, math.inf)
        if compat in ("open_lth", "legacy"):
            threshold = ranked.sort().values[count]
            gone = (ranked <= threshold) & present
        elif compat is None:
            gone = torch.zeros_like(present)
            gone[ranked.sort(stable=True).indices[:count]] = True
        else:
            raise SecateurError(
                f"there is no compat {compat!r}", where="prune_smallest", fix="open_lth, legacy or None"
            )
        for name, part in zip(pool, gone.split([weights[name].numel() for name in pool])):
            new[name] &= ~part.reshape(new[name].shape)
    return new


def shuffled(masks: Mapping[str, Tensor], generator: torch.Generator, scope: str = "layer") -> Masks:
    """The control: as many weights stay, at random places; in each layer as before, or ("global") over all of them.

    >>> mask = {"w": torch.tensor([[True, False, False, True]])}
    >>> shuffled(mask, torch.Generator().manual_seed(0))["w"].sum()
    tensor(2)
    """
    if scope == "layer":
        return {
            name: mask.flatten()[torch.randperm(mask.numel(), generator=generator).to(mask.device)].reshape(
                mask.shape
            )
            for name, mask in masks.items()
        }
    flat = torch.cat([mask.flatten() for mask in masks.values()])
    flat = flat[torch.randperm(flat.numel(), generator=generator).to(flat.device)]
    parts = flat.split([mask.numel() for mask in masks.values()])
    return {name: part.reshape(mask.shape) for (name, mask), part in zip(masks.items(), parts)}


def density(masks: Mapping[str, Tensor]) -> float:
    """The share of the weights that stay."""
    return sum(int(mask.sum()) for mask in masks.values()) / sum(mask.numel() for mask in masks.values())


def smallest_of_groups(weight: Tensor, n: int, m: int) -> Tensor:
    """Mask of the n weights of least magnitude in each run of m consecutive ones of the flattened tensor; ties by index.

    >>> smallest_of_groups(torch.tensor([0.9, 0.1, 0.2, 0.3]), 2, 4)
    tensor([False,  True,  True, False])
    """
    return top_k_rows(-weight.detach().abs().reshape(-1, m), n).reshape(weight.shape)


def below_sampled_threshold(weight: Tensor, ratio: float, sample: int, generator: torch.Generator) -> Tensor:
    """Mask of the weights below the ceil(ratio * sample)-th smallest of `sample` entries drawn with replacement."""
    sizes = weight.detach().abs().flatten()
    drawn = sizes[torch.randint(len(sizes), (sample,), generator=generator).to(sizes.device)]
    threshold = drawn.sort().values[max(0, min(math.ceil(ratio * sample - 1e-9), sample) - 1)]
    return weight.detach().abs() < threshold


def fit_pattern(n: int, m: int, sizes: list[int]) -> tuple[int, int]:
    """(n, m) of n of m that leave, both raised by one until m divides the number of weights of every layer.

    >>> fit_pattern(19, 20, [576, 5760]), fit_pattern(19, 20, [10800])
    ((23, 24), (19, 20))

    Raises `SecateurError` where the layers' sizes have no common divisor above m.
    """
    common = math.gcd(*sizes)
    if common <= m:
        raise SecateurError(
            f"the numbers of weights of the layers have {common} as their greatest common divisor",
            where=f"groups of {m}",
            fix="give a share such as 10%, or leave out layers with skip",
        )
    while common % m:
        n, m = n + 1, m + 1
    return n, m
