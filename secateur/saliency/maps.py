"""What the saliency maps share: ranges, sizes, grids of tokens, maps of several layers, a step towards a class."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur.errors import SecateurError, choose
from secateur.saliency.record import Record, as_targets, undisturbed
from secateur.utils.running import logits_of

COMBINE = ("product", "sum")


def unit_range(values: Tensor) -> Tensor:
    """[N, H, W], each map from 0 to 1; a constant one is all zeros.

    >>> unit_range(torch.tensor([[[1.0, 2.0, 3.0]]]))
    tensor([[[0.0000, 0.5000, 1.0000]]])
    """
    low, high = values.amin((1, 2), keepdim=True), values.amax((1, 2), keepdim=True)
    return torch.where(high > low, (values - low) / (high - low).clamp_min(torch.finfo(values.dtype).tiny), 0)


def combine(maps: Sequence[Tensor], weights: Sequence[float] | None = None, how: str = "product") -> Tensor:
    """Maps [N, H, W] of several layers as one: each in its unit range, then the product of powers or the weighted sum.

    >>> combine([torch.tensor([[[0, 0.5, 1]]]), torch.tensor([[[0.25, 1, 0.5]]])], (0.25, 0.75), "sum")
    tensor([[[0.0000, 0.8750, 0.5000]]])

    The largest of their sizes; weights are divided by their sum, uniform where there are none.
    Raises `SecateurError` for another `how` and a wrong number of weights.
    """
    choose(how, COMBINE, what="combination", where="combine")
    given = [1.0] * len(maps) if weights is None else list(weights)
    if len(given) != len(maps) or min(given) < 0 or not sum(given) > 0:
        raise SecateurError(
            f"{given} can't weigh {len(maps)} layers", where="weights", fix="one each, not negative"
        )
    size = max((m.shape[1:] for m in maps), key=lambda s: s.numel())
    maps = [unit_range(resize(m, size)) for m in maps]
    shares = [w / sum(given) for w in given]
    parts = torch.stack([m**w if how == "product" else m * w for m, w in zip(maps, shares)])
    return parts.prod(0) if how == "product" else parts.sum(0)


def resize(values: Tensor, size: Sequence[int]) -> Tensor:
    """[N, h, w] -> [N, *size], bilinear."""
    if tuple(values.shape[1:]) == tuple(size):
        return values
    return F.interpolate(values[:, None], tuple(size), mode="bilinear", align_corners=False)[:, 0]


def as_grid(x: Tensor, image: Tensor, name: str) -> Tensor:
    """Activations as [N, C, H, W]; tokens [N, tokens, C] go on the grid of patches, without leading extra tokens.

    Raises `SecateurError` where there is no such grid.
    """
    if x.dim() == 4:
        return x
    if x.dim() == 3:
        height, width = image.shape[2:]
        for extra in range(min(9, x.shape[1])):
            tokens = x.shape[1] - extra
            rows = round((tokens * height / width) ** 0.5)
            if rows and tokens % rows == 0 and rows * width == (tokens // rows) * height:
                return x[:, extra:].transpose(1, 2).unflatten(2, (rows, tokens // rows))
    raise SecateurError(
        f"its output {tuple(x.shape)} is no map of the picture",
        where=f"layer {name}",
        fix="name another layer",
    )


def as_names(layers: str | Sequence[str]) -> str | tuple[str, ...]:
    """`last` and `all` as they are; names, with commas or in a sequence, as a tuple."""
    if isinstance(layers, str):
        return (
            layers
            if layers in ("last", "all")
            else tuple(part.strip() for part in layers.split(",") if part.strip())
        )
    return tuple(layers)


def grids(seen: Record) -> Iterator[tuple[Tensor, Tensor]]:
    for name, x in seen.activations.items():
        yield as_grid(x, seen.input, name), as_grid(seen.gradients[name], seen.input, name)


@contextmanager
def one_step(model: nn.Module, image: Tensor, target: Any, rate: float) -> Iterator[Tensor]:
    """The model after one step of SGD on the cross-entropy of `target` (all parameters, eval mode), then as it was.

    Gives the targets. image: [1, C, H, W], as a batch would mix pictures. Rebuffi et al. 2020, meta-saliency.
    """
    first = next(model.parameters())
    with undisturbed(model):
        image = image.detach().to(first.device, first.dtype).clone()
        trained = [p for p in model.parameters() if p.is_floating_point()]
        for parameter in trained:
            parameter.requires_grad_(True)
        logits = logits_of(model(image))
        targets = as_targets(target, logits)
        found = torch.autograd.grad(F.cross_entropy(logits.float(), targets), trained, allow_unused=True)
    before = [p.detach().clone() for p in trained]
    try:
        with torch.no_grad():
            for parameter, gradient in zip(trained, found):
                if gradient is not None:
                    parameter.sub_(rate * gradient)
        yield targets
    finally:
        with torch.no_grad():
            for parameter, value in zip(trained, before):
                parameter.copy_(value)
