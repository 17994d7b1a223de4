"""The one place to run a model: in eval mode, without a cache, on its device; and to read what it returned."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import SecateurError
from secateur.utils.batches import inputs_of
from secateur.utils.inputs import Inputs, as_call, map_tensors


def flat_tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in nested tuples, lists, dicts and dataclasses; other objects (caches) are passed over."""
    return iter(_flat(value, []))


def _flat(value: Any, tensors: list[Tensor]) -> list[Tensor]:
    if isinstance(value, Tensor):
        tensors.append(value)
    elif isinstance(value, (list, tuple)):
        for v in value:
            _flat(v, tensors)
    elif isinstance(value, Mapping):
        for v in value.values():
            _flat(v, tensors)
    return tensors


def flat_items(value: Any) -> Iterator[Any]:
    """The leaves of nested tuples and lists."""
    if isinstance(value, (list, tuple)):
        for v in value:
            yield from flat_items(v)
    else:
        yield value


def flat_ints(value: Any) -> Iterator[int]:
    """The integers in nested tuples, lists and slices."""
    if isinstance(value, int):
        yield value
    elif isinstance(value, slice):
        yield from flat_ints((value.start, value.stop, value.step))
    elif isinstance(value, (list, tuple)):
        for v in value:
            yield from flat_ints(v)


BARE = frozenset(nn.Module().__dict__)
"""The attributes that every module has."""


def own_attributes(module: nn.Module) -> list[str]:
    """The attributes that a module has beside those of every module."""
    return [name for name in module.__dict__ if name not in BARE]


def caches(modules: Iterable[nn.Module]) -> list[dict]:
    """Dictionaries that modules fill with tensors while running (such as position biases by device)."""
    return [
        module.__dict__[name]
        for module in modules
        for name in own_attributes(module)
        if "cache" in name and type(module.__dict__[name]) is dict
    ]


def forget_caches(model: nn.Module) -> None:
    """Empty the dictionaries of tensors that modules fill while running."""
    empty(caches(model.modules()))


def empty(dictionaries: Sequence[dict]) -> None:
    """Clear those of the dictionaries that hold tensors only."""
    for value in dictionaries:
        if all(isinstance(v, Tensor) for v in value.values()):
            value.clear()


def module_paths(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """`named_modules` with every path of a shared module, without a generator for each level."""
    stack = [(path, module)]
    while stack:
        path, module = stack.pop()
        yield path, module
        start = path + "." if path else ""
        stack += [
            (start + name, child) for name, child in reversed(module._modules.items()) if child is not None
        ]


@contextmanager
def without_stale(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Caches of tensors are empty before and after."""
    found = caches(modules)
    empty(found)
    try:
        yield
    finally:
        empty(found)


HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)
"""Where a module keeps them; transformers sets hooks, and notes so on the module, when a model first runs."""


def attributes_of(modules: Iterable[nn.Module]) -> list[tuple[dict, dict]]:
    """What each module holds now beside its mode, its hooks too; `put_back` takes it."""
    hooks = operator.attrgetter(*HOOKS)
    held = [table for module in modules for table in (module.__dict__, *hooks(module))]
    return [(table, dict(table)) for table in held]


def put_back(before: Sequence[tuple[dict, dict]]) -> None:
    """Attributes that modules set, replaced or removed since then are as they were."""
    for now, then in before:
        if [*now] == [*then] and all(map(operator.is_, now.values(), then.values())):
            continue  # the usual case, in a fraction of the time
        for key in [key for key in now if key not in then]:
            del now[key]
        for key, value in then.items():
            if key != "training" and now.get(key, now) is not value:
                now[key] = value


@contextmanager
def unchanged(modules: Iterable[nn.Module]) -> Iterator[None]:
    """What modules note while they run (tables for a picture's size, shapes they have seen) is gone afterwards."""
    before = attributes_of(modules)
    try:
        yield
    finally:
        put_back(before)


@contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """Models that can return a cache do not, nor do their parts: its tensors are no output to be kept whole."""
    found = [getattr(model, "config", None), *(vars(module).get("config") for module in model.modules())]
    configs: Any = {id(config): config for config in found if getattr(config, "use_cache", None)}.values()
    settings = [config.use_cache for config in configs]
    for config in configs:
        config.use_cache = False
    try:
        yield
    finally:
        for config, setting in zip(configs, settings, strict=True):
            config.use_cache = setting


def call(model: nn.Module, inputs: Inputs) -> Any:
    """What the model returns for a tensor, a tuple of positional or a dict of keyword arguments."""
    args, kwargs = as_call(inputs)
    return model(*args, **kwargs)


def run(model: nn.Module, batch: Inputs) -> Any:
    """The model on a batch, moved to its device; a language model doesn't keep keys and values. Labels are left out."""
    batch = inputs_of(model, batch)
    args, kwargs = as_call(map_tensors(batch, lambda tensor: tensor.to(device_of(model))))
    if "use_cache" in inspect.signature(type(model).forward).parameters:
        kwargs.setdefault("use_cache", False)
    return model(*args, **kwargs)


def with_residual(output: Any, inputs: Any, mix: Callable[[Tensor, Tensor], Tensor]) -> Any:
    """What a block gave, with mix(its input of the same shape, it) in place of its first tensor, or of each of a list.

    >>> with_residual((torch.ones(2), "cache"), (torch.zeros(2),), lambda given, made: given)
    (tensor([0., 0.]), 'cache')
    """
    given = _flat(inputs, [])

    def mixed(made: Tensor) -> Tensor:
        place = next(n for n, value in enumerate(given) if value.shape == made.shape)
        return mix(given.pop(place), made)  # of several of one shape each continues its own

    if isinstance(output, list):
        return [mixed(made) if isinstance(made, Tensor) else made for made in output]
    value = mixed(next(flat_tensors(output)))
    return (value, *output[1:]) if isinstance(output, tuple) else value


def logits_of(output: Any) -> Tensor:
    """The logits in what a model returned: a tensor, something with `.logits`, or a tuple that begins with them.

    >>> logits_of((torch.ones(2), "cache"))
    tensor([1., 1.])

    Raises:
        SecateurError: there are none.
    """
    first = output[0] if isinstance(output, tuple | list) and output else None
    for value in (output, getattr(output, "logits", None), first):
        if isinstance(value, Tensor):
            return value
    raise SecateurError(f"a {type(output).__name__} holds no logits", where="model output")


def device_of(model: nn.Module) -> torch.device:
    """The device of a model's first parameter; the CPU where it has none."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; every module has its own mode again afterwards, whatever was done to it."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        if any(mode for _, mode in modes):
            model.eval()
        yield
    finally:
        for module, mode in modes:
            if module.training is not mode:
                module.training = mode


@contextmanager
def frozen_weights(model: nn.Module) -> Iterator[None]:
    """No parameter of the model requires a gradient inside; afterwards those do that did, whatever was done to them."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
