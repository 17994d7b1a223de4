"""Units as zeros: `mask_units` and `unmask_units`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from secateur.graph.groups import Graph, Group
from secateur.graph.run import Functions
from secateur.surgery.changes import Keep, _gone, _removed_blocks, _tensor
from secateur.utils.running import with_residual


def mask_units(model: nn.Module, graph: Graph, keep: Keep) -> None:
    """Zero everything the removed units own, in place; removed blocks pass their input through.

    Units that compete for being picked (experts, by a router's softmax and top-k) take no part any more: their
    logits are minus infinity.

    >>> mask_units(model, graph, {"fc1:neurons": torch.tensor([0, 2])})

    Raises SecateurError for unknown or frozen groups and for unit numbers out of range.
    """
    with torch.no_grad():
        for name, dims in zeros(graph, keep).items():
            tensor = _tensor(model, name)
            for dim, places in dims.items():
                tensor.index_fill_(dim, places.to(tensor.device), 0)
    leave_out(model, graph, keep)


def zeros(graph: Graph, keep: Keep) -> dict[str, dict[int, Tensor]]:
    """Where `mask_units` writes zeros: name -> axis -> places along it."""
    found: dict[str, dict[int, list[Tensor]]] = {}
    for group, kept in graph._kept(keep):
        gone = None if group.whole else _gone(group, kept)
        for s in group.slices if gone is not None else ():
            if s.name not in graph.normalised:
                found.setdefault(s.name, {}).setdefault(s.dim, []).append(s.index[gone].reshape(-1))
    return {name: {dim: torch.cat(v) for dim, v in dims.items()} for name, dims in found.items()}


def unit_masks(model: nn.Module, graph: Graph, keep: Keep) -> dict[str, Tensor]:
    """Bool masks of the parameters that `mask_units` writes zeros in; True stays.

    >>> unit_masks(model, graph, {"fc1:neurons": torch.tensor([0, 2])})["fc1.bias"]  # doctest: +SKIP
    tensor([ True, False,  True, False])
    """
    parameters = dict(model.named_parameters())
    masks = {}
    for name, dims in zeros(graph, keep).items():
        if name in parameters:
            masks[name] = torch.ones(parameters[name].shape, dtype=torch.bool)
            for dim, places in dims.items():
                masks[name].index_fill_(dim, places, False)
    return masks


def leave_out(model: nn.Module, graph: Graph, keep: Keep) -> None:
    """What `mask_units` does beside zeros: blocks pass their input on, attentions say nothing, novices give their vector,
    and routers don't pick removed units."""
    for group, kept in graph._kept(keep):
        if group.kind == "novices":
            _stand_in(model, group, kept)
            continue
        for path in _removed_blocks(group, kept) if group.whole else ():
            hook = _pass_through if group.kind == "layers" else _silent
            model.get_submodule(path).register_forward_hook(hook, with_kwargs=True)
    _exclude(model, graph, keep)


def unmask_units(model: nn.Module) -> None:
    """Take away what `mask_units` added to a model beside zeros: blocks run again, routers may pick any expert.

    >>> unmask_units(model)  # before the tensors are put back, or the units really leave
    """
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key, hook in list(hooks.items()):
                ours = isinstance(hook, _Enter | _Leave | _Weigh | _Add)
                if ours or hook in (_pass_through, _silent, _constant):
                    module._forward_hooks_with_kwargs.pop(key, None)
                    module._forward_pre_hooks_with_kwargs.pop(key, None)
                    module._forward_hooks_always_called.pop(key, None)
                    del hooks[key]


# --- units that are picked


class _Without(TorchFunctionMode):
    """While a module runs, removed units get minus infinity where its units compete."""

    def __init__(self, masks: Sequence[tuple[str, Tensor]]):
        super().__init__()
        self.masks = masks

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        for known, gone in self.masks:
            if name != known or not args or not _fits(gone, args[0]):
                continue
            args = (args[0].masked_fill(gone.to(args[0].device), -torch.inf), *args[1:])
            break
        return func(*args, **(kwargs or {}))


def _fits(gone: Tensor, value: Any) -> bool:
    return (
        isinstance(value, Tensor)
        and value.is_floating_point()
        and value.dim() == gone.dim()
        and all(n in (1, m) for n, m in zip(gone.shape, value.shape, strict=True))
    )


class _Enter:
    def __init__(self, masks: Sequence[tuple[str, Tensor]]):
        self.masks = masks
        self.modes: list[_Without | None] = []

    def __call__(self, module: nn.Module, args: Any) -> None:
        tracing = any(isinstance(mode, Functions) for mode in _get_current_function_mode_stack())
        self.modes.append(None if tracing else _Without(self.masks))
        if self.modes[-1] is not None:
            self.modes[-1].__enter__()


class _Leave:
    def __init__(self, enter: _Enter):
        self.enter = enter

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        mode = self.enter.modes.pop() if self.enter.modes else None
        if mode is not None:
            mode.__exit__(None, None, None)


def _exclude(model: nn.Module, graph: Graph, keep: Keep) -> None:
    gone = ~graph._alive(keep)
    masks: dict[str, list[tuple[str, Tensor]]] = {}
    for path, name, classes in graph._choices:
        if gone[classes].any():
            masks.setdefault(path, []).append((name, torch.from_numpy(np.ascontiguousarray(gone[classes]))))
    for path, found in masks.items():
        module = model.get_submodule(path)
        enter = _Enter(found)
        module.register_forward_pre_hook(enter)
        module.register_forward_hook(_Leave(enter), always_call=True)


# --- blocks, and the attention of blocks


def _pass_through(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
    return with_residual(output, (args, kwargs), lambda given, made: given)


def _silent(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
    if isinstance(output, Tensor):
        return torch.zeros_like(output)
    return (torch.zeros_like(output[0]), *output[1:])


# --- experts that leave a vector behind


def _stand_in(model: nn.Module, group: Group, kept: Tensor) -> None:
    if group.modules:
        for path in _removed_blocks(group, kept):
            model.get_submodule(path).register_forward_hook(_constant)
        return
    holder = model.get_submodule(group.slices[0].name.rpartition(".")[0])
    weigh = _Weigh(_gone(group, kept))
    holder.register_forward_pre_hook(weigh, with_kwargs=True)
    holder.register_forward_hook(_Add(weigh))


def _constant(module: nn.Module, args: Any, output: Any) -> Any:
    constant = getattr(module, "constant", None)
    return torch.zeros_like(output) if constant is None else constant.to(output.dtype).expand_as(output)


class _Weigh:
    """Stacked experts are told that those that left weigh nothing; their weights are kept for what is added."""

    def __init__(self, gone: Tensor):
        self.gone = gone
        self.gates: list[Tensor] = []

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        given = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
        numbers = next(x for x in given if not x.is_floating_point())
        weights = next(x for x in given[1:] if x.is_floating_point() and x.shape == numbers.shape)
        gone = self.gone.to(numbers.device)[numbers]
        gates = weights.new_zeros(len(numbers), len(self.gone))
        self.gates.append(gates.scatter_add(1, numbers, weights * gone))

        def weighed(x: Any) -> Any:
            return x.masked_fill(gone, 0) if x is weights else x

        return tuple(map(weighed, args)), {key: weighed(x) for key, x in kwargs.items()}


class _Add:
    def __init__(self, weigh: _Weigh):
        self.weigh = weigh

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        gates, constants = self.weigh.gates.pop(), getattr(module, "constants", None)
        if constants is None:
            return output
        return output + (gates.to(constants.dtype) @ constants).to(output.dtype).view_as(output)
