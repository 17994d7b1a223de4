"""What stands in the place of experts that became a vector."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn


class Constant(nn.Module):
    """The same vector [width] whatever comes; zeros where there is none."""

    def __init__(self, constant: torch.Tensor | None = None):
        super().__init__()
        self.register_parameter("constant", None if constant is None else nn.Parameter(constant))

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        constant = self._parameters["constant"]
        return torch.zeros_like(x) if constant is None else constant.to(x.dtype).expand_as(x)


class Novices(nn.Module):
    """Before a class of stacked experts: those numbered in `novices` give their row of `constants`, the others run.

    Called as such experts are: states [..., width], numbers and weights [tokens, k] of the experts that a token is sent to.
    """

    novices: list[int]

    def forward(self, states: torch.Tensor, *args: torch.Tensor, **kwargs: torch.Tensor) -> torch.Tensor:
        given = [*args, *kwargs.values()]
        numbers = next(x for x in given if not x.is_floating_point())
        weights = next(x for x in given if x.is_floating_point() and x.shape == numbers.shape)
        left = next(p for p in self.parameters(recurse=False) if p.dim() == 3).shape[0]
        total, gone = left + len(self.novices), torch.tensor(self.novices)
        stays = torch.ones(total, dtype=torch.bool)
        stays[gone] = False
        places = torch.empty(total, dtype=torch.int64)
        places[stays], places[gone] = torch.arange(left), torch.arange(left, total)
        numbers = places.to(numbers.device)[numbers]
        rows = states.reshape(-1, states.shape[-1])
        token, slot = (numbers < left).nonzero(as_tuple=True)
        out = torch.zeros_like(rows)
        if len(token):
            own = (rows[token], numbers[token, slot, None], weights[token, slot, None])
            out = out.index_add(0, token, super().forward(*own).to(out.dtype))
        constants = getattr(self, "constants", None)
        if constants is not None:
            gates = weights.new_zeros(len(rows), total).scatter_add(1, numbers, weights)[:, left:]
            out = out + (gates.to(constants.dtype) @ constants).to(out.dtype)
        return out.view_as(states)


def leave_constants(model: nn.Module, cut: dict[str, Any]) -> None:
    """Experts of a dense model give vectors: those in lists at `cut["constants"]`, stacked ones at `cut["novices"]`."""
    for path in cut["constants"]:
        parent, _, leaf = path.rpartition(".")
        shape, like = cut["shapes"].get(f"{path}.constant"), next(model.get_submodule(path).parameters())
        vector = None if shape is None else like.new_empty(shape)
        setattr(model.get_submodule(parent), leaf, Constant(vector))
    for path in cut["novices"]:
        experts = model.get_submodule(path)
        experts.__class__ = type(type(experts).__name__, (Novices, type(experts)), {})


def sources(cut: Mapping[str, Any]) -> str:
    """What a written loader needs of this file: nothing where no expert is a vector."""
    if not cut.get("constants") and not cut.get("novices"):
        return ""
    return "".join(f"{inspect.getsource(own)}\n\n" for own in (Constant, Novices, leave_constants))
