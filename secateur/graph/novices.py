"""Experts as units that leave a vector behind: the router goes on sending tokens to them."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from secateur.graph.groups import Graph, Group, Slice

KIND = "novices"


def novice_groups(model: nn.Module, graph: Graph) -> list[Group]:
    """Groups of kind `novices`, one for each of experts: a unit is an expert without what the router has of it.

    >>> group = novice_groups(model, graph)[0]  # doctest: +SKIP
    >>> group.name, group.size, [s.name for s in group.slices]
    ('model.layers.0.mlp:novices', 8, ['model.layers.0.mlp.experts.gate_up_proj', 'model.layers.0.mlp.experts.down_proj'])

    They aren't part of `trace`, since they are the experts' own weights. Where a router chooses among groups of experts, each
    expert is a unit here. One must stay.
    """
    return [_novices(model, group) for group in graph.groups if group.kind == "experts"]


def _novices(model: nn.Module, group: Group) -> Group:
    name = f"{group.name.rpartition(':')[0]}:{KIND}"
    made = Group(name, KIND, group.size, reason=group.reason, modules=group.modules)
    if group.modules:
        return made
    path = holder_of(model, group)
    if path is None:
        return replace(made, reason=group.reason or "its experts are neither stacked nor in a list")
    if hasattr(model.get_submodule(path), "novices"):
        return replace(made, reason="some of its experts are vectors already")
    own = [s for s in group.slices if s.dim == 0 and s.name.rpartition(".")[0] == path]
    count = own[0].index.numel()
    slices = [Slice(s.name, 0, torch.arange(count)[:, None], s.role) for s in own]
    return replace(made, size=count, slices=tuple(slices))


def holder_of(model: nn.Module, group: Group) -> str | None:
    """The path of the module that holds stacked experts; None where there is none.

    >>> holder_of(model, graph["model.layers.0.mlp:experts"])  # doctest: +SKIP
    'model.layers.0.mlp.experts'
    """
    for s in group.slices:
        path, _, own = s.name.rpartition(".")
        if s.dim == 0 and getattr(getattr(model.get_submodule(path), own, None), "ndim", 0) == 3:
            return path
    return None
