"""Experts that are modules of a list are given only the rows routed to them: which of those are padding.

Their rows are copies of rows that the list's owner was given, so they are found by their bits. Equal rows are routed alike, so
it doesn't matter which of them is taken for which.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

Mask = Callable[[nn.Module, Tensor], Tensor | None]
"""A module and what it is given [..., width] -> [rows] bool of those that count; None: all, or it isn't known."""


class Routed:
    """Follows rows from the owner of a list of modules to the modules, while `hooks` are on."""

    def __init__(self, model: nn.Module, modules: list[nn.Module], mask: Mask):
        self.mask = mask
        self.expert = _experts(model, modules)
        self.given: dict[nn.Module, Tensor] = {}
        """What each owner was given, while it runs."""
        self.sides: dict[nn.Module, tuple[Tensor, Tensor]] = {}
        self.visible: dict[nn.Module, Tensor] = {}
        """[rows] bool of each expert's last call, where it isn't that of all tokens."""

    def hooks(self) -> list[Any]:
        """Put on the modules; each has a `remove`."""
        handles = []
        for owner in {owner for _, owner in self.expert.values()}:
            handles += [
                owner.register_forward_pre_hook(self._enter, with_kwargs=True),
                owner.register_forward_hook(self._leave, always_call=True),
            ]
        for expert, owner in set(self.expert.values()):
            hook = self._hook(weakref.ref(owner))
            handles.append(expert.register_forward_pre_hook(hook, with_kwargs=True))
        return handles

    def of(self, module: nn.Module, rows: int) -> Tensor | None:
        """[rows] bool of what counts for a module inside an expert; None where it is given all tokens."""
        pair = self.expert.get(module)
        visible = None if pair is None else self.visible.get(pair[0])
        return visible if visible is not None and len(visible) == rows else None

    def _enter(self, owner: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        x = _first(args, kwargs)
        if x is not None and self.mask(owner, x) is not None:
            self.given[owner] = x.detach()

    def _leave(self, owner: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.given.pop(owner, None)
        self.sides.pop(owner, None)

    def _sides(self, owner: nn.Module, whole: Tensor) -> tuple[Tensor, Tensor]:
        """Marks of the rows that an owner was given: those in view, and padding."""
        if owner not in self.sides:
            mask, marks = self.mask(owner, whole), _marks(whole.flatten(0, -2))
            assert mask is not None
            self.sides[owner] = marks[mask], marks[~mask]
        return self.sides[owner]

    def _hook(self, owner: weakref.ref[nn.Module]) -> Any:
        def hook(expert: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            self.visible.pop(expert, None)
            x, whole = _first(args, kwargs), self.given.get(owner())  # type: ignore[arg-type]
            if x is None or whole is None or x.shape == whole.shape and x.dim() > 2:
                return
            rows = x.detach().flatten(0, -2)
            alike = rows.shape[1] == whole.shape[-1] and rows.dtype == whole.dtype
            visible = _followed(_marks(rows), *self._sides(owner(), whole)) if alike else None  # type: ignore[arg-type]
            if visible is not None:
                self.visible[expert] = visible
            elif len(rows) < whole.shape[:-1].numel():
                warnings.warn(
                    f"{type(expert).__name__} is given rows that aren't those of {type(owner()).__name__}, "
                    "so padding counts in its statistics; calibrate with sequences of one length",
                    stacklevel=2,
                )

        return hook


def _experts(model: nn.Module, modules: list[nn.Module]) -> dict[nn.Module, tuple[nn.Module, nn.Module]]:
    """Of each module that lies in a list: the list's member that it belongs to, and the list's owner."""
    above = {child: parent for parent in model.modules() for child in parent.children()}
    found = {}
    for module in modules:
        expert: nn.Module | None = module
        while expert in above and not isinstance(above[expert], nn.ModuleList | nn.ModuleDict):
            expert = above[expert]
        owner = expert
        while owner in above and isinstance(above[owner], nn.ModuleList | nn.ModuleDict):
            owner = above[owner]
        owner = above.get(owner) if owner is not expert else None  # type: ignore[arg-type]
        if expert is not None and owner is not None:
            found[module] = (expert, owner)
    return found


def _first(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The hidden states [..., width] among what a module is given."""
    given = (*args, *kwargs.values())
    return next((x for x in given if isinstance(x, Tensor) and x.is_floating_point() and x.dim() > 1), None)


def _marks(x: Tensor) -> Tensor:
    """[n] a number for each row of [n, width]: equal for rows that are equal bit by bit, and by all odds only for those."""
    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    drawn = torch.randint(-(2**62), 2**62, (x.shape[1],), generator=torch.Generator().manual_seed(0))
    weights = (drawn * 2 + 1).to(x.device)
    return torch.cat([(part.view(kind).long() * weights).sum(1) for part in x.contiguous().split(1024)])


def _followed(mine: Tensor, shown: Tensor, hidden: Tensor) -> Tensor | None:
    """bool [n]: which of the rows `mine` are among those that are `shown`; None where some are in neither, by their marks."""
    visible, padding = torch.isin(mine, shown), torch.isin(mine, hidden)
    if not bool((visible | padding).all()):
        return None
    # of rows that are the same in both, as many count as there are in view
    for mark in mine[visible & padding].unique():
        same = mine == mark
        visible &= ~(same & (same.cumsum(0) > (shown == mark).sum()))
    return visible
