"""A residual stream in other coordinates: norms folded into what reads them, and every layer turned along."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from secateur.errors import SecateurError
from secateur.graph.groups import Graph, Group
from secateur.stats.streams import norms_read
from secateur.surgery.changes import set_values
from secateur.utils.inputs import Inputs
from secateur.utils.running import call, evaluating, flat_tensors, without_cache
from secateur.utils.screen import Screen


@dataclass(repr=False)
class Stream(Screen):
    """What stands on a stream. norms: scale [width] and what is added to the weight to give it (0, or 1 where the weight is
    kept as a difference from one), by path; reads: parameter -> the norm before it; writes: the other parameters."""

    group: Group
    norms: dict[str, tuple[Tensor, float]]
    reads: dict[str, str]
    writes: list[str]
    dims: dict[str, int]


def find_stream(model: nn.Module, graph: Graph, group: Group, inputs: Inputs) -> Stream:
    """The stream whose channels are the units of a group.

    >>> stream = find_stream(llama, graph, graph["stem:hidden"], inputs)  # doctest: +SKIP
    >>> stream.reads["lm_head.weight"]  # doctest: +SKIP
    'model.norm'

    Raises `SecateurError`, with the reason, where it can't be turned: a norm other than a root mean square, a layer that
    reads the stream without a norm, or units of several entries.
    """
    where = group.name
    slices = {(s.name, s.dim): s for s in group.slices}
    for alias, first in graph.aliases.items():
        slices |= {(alias, dim): s for (name, dim), s in slices.items() if name == first}
    if any(s.index.shape[1] != 1 for s in slices.values()):
        raise SecateurError("its channels are several entries of a layer", where=where)
    scales: dict[str, tuple[Tensor, float]] = {}
    for name, _ in slices:
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        if leaf == "weight" and module.weight.dim() == 1:  # type: ignore[operator]
            scales[path] = scale_of(module, path)
    readers = [name for (name, _), s in slices.items() if s.role == "in" or name in graph.aliases]
    given = norms_read(model, inputs, [*scales], [name.rpartition(".")[0] for name in readers])
    reads: dict[str, str] = {}
    for name in readers:
        norm = given[name.rpartition(".")[0]]
        if norm is None:
            raise SecateurError(f"{name} reads it and not what a norm gives", where=where)
        reads[name] = norm
    writes = [name for name, _ in slices if name not in reads and name.rpartition(".")[0] not in scales]
    return Stream(group, scales, reads, writes, {name: dim for name, dim in slices})


@torch.no_grad()
def scale_of(norm: nn.Module, path: str = "") -> tuple[Tensor, float]:
    """([width], what is added to the weight to give it) of a norm by the root mean square.

    >>> norm = nn.RMSNorm(2)
    >>> scale_of(norm)
    (tensor([1., 1.], dtype=torch.float64), 0.0)

    Raises `SecateurError` for any other norm: it is tried on noise.
    """
    weight: Tensor = norm.weight  # type: ignore[assignment]
    x = torch.randn(8, len(weight), generator=torch.Generator().manual_seed(0)).to(weight) * 8 + 1
    plain = x.double() / x.double().square().mean(-1, keepdim=True).sqrt()
    ratio = norm(x).double() / plain
    for added in (0.0, 1.0):
        scale = weight.double() + added
        near = (ratio - scale).abs() <= (1e-3 if weight.dtype == torch.float32 else 5e-2) * (1 + scale.abs())
        if near.all():
            return scale, added
    raise SecateurError(
        f"{type(norm).__name__} isn't a norm by the root mean square, through which a rotation passes",
        where=path or "norm",
        fix="take a method that removes heads and neurons, such as flap or 2ssp",
    )


@torch.no_grad()
def rotated(model: nn.Module, stream: Stream, rotation: Tensor) -> dict[str, Tensor]:
    """New values of all that stands on the stream, by name, so that its channel j is x · rotation[:, j]; norms scale by one.

    >>> values = rotated(model, stream, torch.eye(576, dtype=torch.float64))  # norms folded, and nothing else  # doctest: +SKIP

    rotation: [width, width], orthogonal, float64. A tensor that was tied to another, and is folded with another norm, has a
    value of its own. In float64 until the last step.
    """
    values: dict[str, Tensor] = {}
    rotation = rotation.double()
    for name, dim in stream.dims.items():
        path, _, leaf = name.rpartition(".")
        old: Tensor = getattr(model.get_submodule(path), leaf)
        if path in stream.norms:
            values[name] = torch.full_like(old, 1 - stream.norms[path][1])
            continue
        lines = old.detach().double().movedim(dim, -1)
        if name in stream.reads:
            lines = lines * stream.norms[stream.reads[name]][0].to(lines.device)
        values[name] = (lines @ rotation.to(lines.device)).movedim(-1, dim).to(old.dtype).contiguous()
    return values


@torch.no_grad()
def changes_nothing(
    model: nn.Module, values: Mapping[str, Tensor], inputs: Inputs, tolerance: float
) -> float | None:
    """How much more than `tolerance` (relative to the largest output) a model with these values differs; None if it doesn't."""
    other = copy.deepcopy(model)
    set_values(other, values)
    found = []
    for each in (model, other):
        with evaluating(each), without_cache(each):
            found.append([t.float() for t in flat_tensors(call(each, inputs)) if t.is_floating_point()])
    gaps = [float((a - b).abs().max() / a.abs().max().clamp_min(1e-12)) for a, b in zip(*found, strict=True)]
    return max(gaps) if max(gaps) > tolerance else None
