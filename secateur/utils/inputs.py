"""Example inputs: a tensor, a tuple of positional arguments or a dict of keyword arguments of `model.forward`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import SecateurError

Inputs = Tensor | tuple | list | dict


def as_call(inputs: Inputs) -> tuple[tuple, dict[str, Any]]:
    """(args, kwargs) so that `model(*args, **kwargs)` runs.

    >>> as_call({"x": 1})
    ((), {'x': 1})
    """
    if isinstance(inputs, dict) or hasattr(inputs, "keys"):
        return (), dict(inputs)
    if isinstance(inputs, tuple | list):
        return tuple(inputs), {}
    if isinstance(inputs, Tensor):
        return (inputs,), {}
    raise SecateurError(
        f"inputs is a {type(inputs).__name__}",
        where="inputs",
        fix="pass a tensor, a tuple or a dict of keywords",
    )


def map_tensors(value: Any, fn: Callable[[Tensor], Any]) -> Any:
    """`fn` over every tensor of nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        return fn(value)
    if isinstance(value, dict) or hasattr(value, "keys"):
        return {key: map_tensors(item, fn) for key, item in dict(value).items()}
    if isinstance(value, tuple | list):
        return type(value)(map_tensors(item, fn) for item in value)
    return value


def map_ids(inputs: Inputs, fn: Callable[[Tensor], Tensor]) -> Any:
    """`fn` over token ids alone: integers that are the first input, or whose name ends in `input_ids`.

    >>> map_ids({"input_ids": torch.tensor([[7]]), "attention_mask": torch.tensor([[1]])}, lambda ids: ids % 4)
    {'input_ids': tensor([[3]]), 'attention_mask': tensor([[1]])}
    """

    def one(value: Any) -> Any:
        return fn(value) if isinstance(value, Tensor) and not value.dtype.is_floating_point else value

    if isinstance(inputs, Tensor):
        return one(inputs)
    if isinstance(inputs, tuple | list):
        return type(inputs)([one(value) if place == 0 else value for place, value in enumerate(inputs)])
    return {k: one(v) if str(k).endswith("input_ids") else v for k, v in dict(inputs).items()}


def describe(inputs: Inputs | None) -> Any:
    """A JSON-able description from which like inputs can be made: shapes, dtypes, no values."""
    return map_tensors(
        inputs, lambda t: {"tensor": list(t.shape), "dtype": str(t.dtype).removeprefix("torch.")}
    )


def from_description(spec: Any) -> Any:
    """Inputs of the described shapes: ones for integers and booleans, seeded noise for floats."""
    if isinstance(spec, dict) and set(spec) == {"tensor", "dtype"}:
        dtype = getattr(torch, str(spec["dtype"]), None)
        if not isinstance(dtype, torch.dtype):
            raise SecateurError(
                f"{spec['dtype']!r} is no dtype", where="inputs", fix="such as float32, int64"
            )
        if dtype.is_floating_point:
            return torch.randn(spec["tensor"], generator=torch.Generator().manual_seed(0)).to(dtype)
        return torch.ones(spec["tensor"], dtype=dtype)
    if isinstance(spec, dict):
        return {key: from_description(item) for key, item in spec.items()}
    if isinstance(spec, list):
        return tuple(from_description(item) for item in spec)
    return spec


def picture_size(model: nn.Module) -> tuple[int, ...] | None:
    """[channels, height, width] of the pictures that a timm model, or one with `input_size`, says it was made for."""
    timm = getattr(model, "pretrained_cfg", None) or {}
    return getattr(model, "input_size", None) or timm.get("input_size")


def default_inputs(model: nn.Module, length: int = 16) -> Inputs:
    """Token ids for a language model, noise for a model that says its pictures' size, what
    a file describes for a model that was read from one; others need the caller's `inputs`."""
    if hasattr(model, "example_inputs"):
        return model.example_inputs()  # type: ignore[operator]
    config = getattr(model, "config", None)
    if (size := picture_size(model)) is not None:
        noise = torch.randn((1, *size), generator=torch.Generator().manual_seed(0))
        return noise.to(next(model.parameters()))
    vocabulary = getattr(config, "vocab_size", None)
    if vocabulary is None or not hasattr(model, "get_input_embeddings"):
        raise SecateurError(
            f"{type(model).__name__} isn't a language model, so its inputs can't be guessed",
            where="inputs",
            fix="pass an example input: a tensor, a tuple or a dict of keyword arguments",
        )
    device = next(model.parameters()).device
    length = min(length, getattr(config, "max_position_embeddings", None) or length)
    ids = torch.randint(0, vocabulary, (1, length), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids.to(device)}


def noise_like(
    inputs: Inputs,
    samples: int,
    generator: torch.Generator,
    mean: float = 0.45,
    std: float = 0.225,
    vocabulary: int | None = None,
) -> list[Inputs]:
    """Batches of 16 inputs shaped like `inputs`: (U(0, 1) - mean) / std for floats, random ids for `input_ids`.

    >>> [x.shape for x in noise_like(torch.zeros(1, 3, 8, 8), 20, torch.Generator())]
    [torch.Size([16, 3, 8, 8]), torch.Size([4, 3, 8, 8])]

    Other integers are repeated as they are.
    """

    def one(tensor: Tensor, count: int, ids: bool) -> Tensor:
        shape = (count, *tensor.shape[1:])
        if tensor.is_floating_point():
            noise = (torch.rand(shape, generator=generator) - mean) / std
            return noise.to(tensor.device, tensor.dtype)
        if ids and vocabulary:
            return torch.randint(0, vocabulary, shape, generator=generator).to(tensor)
        return tensor[:1].expand(shape)

    batches: list[Inputs] = []
    for start in range(0, samples, 16):
        count = min(16, samples - start)
        if isinstance(inputs, Tensor):
            batches.append(one(inputs, count, True))
        elif isinstance(inputs, tuple | list):
            batches.append(tuple(one(t, count, True) for t in inputs))
        else:
            batches.append({key: one(t, count, key == "input_ids") for key, t in dict(inputs).items()})
    return batches
