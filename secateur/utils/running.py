"""Running a model: its tensors, its arguments, its caches, its device, evaluation mode."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from secateur.errors import SecateurError
from secateur.utils.batches import inputs_of
from secateur.utils.inputs import Inputs, as_call, map_tensors


def flat_tensors(value: Any) -> Iterator[torch.Tensor]:
    """All tensors in nested tuples, lists, dicts and dataclasses; other objects (caches) are passed over."""
    return iter(_flat(value, []))


def _flat(value: Any, found: list[torch.Tensor]) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        found.append(value)
    elif isinstance(value, (list, tuple)):
        for v in value:
            _flat(v, found)
    elif isinstance(value, Mapping):
        for v in value.values():
            _flat(v, found)
    return found


def flat_items(value: Any) -> Iterator[Any]:
    """The leaves of nested tuples and lists."""
    if isinstance(value, (list, tuple)):
        for v in value:
            yield from flat_items(v)
    else:
        yield value


def flat_ints(value: Any) -> Iterator[int]:
    if isinstance(value, int):
        yield value
    elif isinstance(value, slice):
        yield from flat_ints((value.start, value.stop, value.step))
    elif isinstance(value, (list, tuple)):
        for v in value:
            yield from flat_ints(v)


def call_arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A tensor, a tuple of positional or a dict of keyword arguments, as (args, kwargs)."""
    if isinstance(inputs, torch.Tensor):
        return (inputs,), {}
    if isinstance(inputs, (tuple, list)):
        return tuple(inputs), {}
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    raise SecateurError(
        f"inputs of type {type(inputs).__name__}",
        where="trace",
        fix="give a tensor, a tuple of positional arguments or a dict of keyword arguments",
    )


def caches(modules: Iterable[nn.Module]) -> list[dict]:
    """Dictionaries that modules fill with tensors while running (such as position biases by device)."""
    return [
        value
        for module in modules
        for name, value in module.__dict__.items()
        if type(value) is dict and "cache" in name
    ]


def forget_caches(model: nn.Module) -> None:
    """Empty the dictionaries of tensors that modules fill while running."""
    empty(caches(model.modules()))


def empty(found: Sequence[dict]) -> None:
    for value in found:
        if all(isinstance(v, torch.Tensor) for v in value.values()):
            value.clear()


@contextmanager
def without_stale(modules: Sequence[tuple[str, nn.Module]]) -> Iterator[None]:
    """Caches of tensors are empty before and after."""
    empty(caches(module for _, module in modules))
    try:
        yield
    finally:
        empty(caches(module for _, module in modules))


@contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """Models that can return a cache do not: its tensors are no output to be kept whole."""
    config = getattr(model, "config", None)
    if not getattr(config, "use_cache", False):
        yield
        return
    config.use_cache = False  # type: ignore[union-attr]
    try:
        yield
    finally:
        config.use_cache = True  # type: ignore[union-attr]


def run(model: nn.Module, batch: Inputs) -> Any:
    """The model on a batch, moved to its device; a language model doesn't keep keys and values. Labels are left out."""
    batch = inputs_of(model, batch)
    args, kwargs = as_call(map_tensors(batch, lambda tensor: tensor.to(device_of(model))))
    if "use_cache" in inspect.signature(type(model).forward).parameters:
        kwargs.setdefault("use_cache", False)
    return model(*args, **kwargs)


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode; every module's own mode comes back."""
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        yield
    finally:
        for module in training:
            module.training = True
