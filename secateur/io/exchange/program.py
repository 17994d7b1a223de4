"""A graph read from a file as a module: tensors under readable names, and one small module for each operation.

Integers that an operation was given (sizes of a reshape, groups of a convolution) are attributes of its module, so that
a cut finds and changes them as it does in any other model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import SecateurError


@dataclass(frozen=True)
class Spec:
    """An input of a file: name, sizes (a name or None where the file leaves the size open), dtype."""

    name: str
    shape: tuple[int | str | None, ...]
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.name} [{', '.join('?' if n is None else str(n) for n in self.shape)}]"


class Template:
    """What a file was read from, shared by all copies of its module."""

    def __init__(self, value: Any):
        self.value = value

    def __deepcopy__(self, memo: dict) -> Template:
        return self


class Program(nn.Module):
    """A module made from a file. `specs` describe its inputs; `example_inputs` makes some."""

    specs: tuple[Spec, ...]
    hints: Template = Template({})

    def example_inputs(self, shape: str | None = None) -> tuple[Tensor, ...]:
        """Inputs as the file describes them: an open first size is 1, other open sizes come from `shape`.

        >>> program.example_inputs("1,3,64,64")  # doctest: +SKIP
        >>> program.example_inputs("input_ids:1,16;attention_mask:1,16")  # doctest: +SKIP

        Numbers are seeded noise; integers are 0 and 1, and 1 throughout for masks. Raises `SecateurError` for an open
        size that is not given and for a shape that contradicts the file.
        """
        given = parse_shapes(shape, self.specs)
        like = next((t for t in self.parameters() if t.is_floating_point()), torch.zeros(()))
        noise = torch.Generator().manual_seed(0)
        made = []
        for spec in self.specs:
            sizes = given.get(spec.name)
            if sizes is None:
                sizes = [1 if k == 0 and not isinstance(n, int) else n for k, n in enumerate(spec.shape)]  # type: ignore[misc]
                hint = self.hints.value.get(spec.name, sizes)
                sizes = [n if isinstance(n, int) else m for n, m in zip(sizes, hint, strict=True)]
            if not all(isinstance(n, int) for n in sizes):
                raise SecateurError(
                    f"the file leaves sizes of {spec} open",
                    where="inputs",
                    fix=f"give --input-shape, such as --input-shape {_suggest(self.specs)}",
                )
            value = torch.empty(sizes)
            if spec.dtype.is_floating_point:
                dtype = like.dtype if like.is_floating_point() else spec.dtype
                value = torch.randn(sizes, generator=noise).to(dtype)
            elif "mask" in spec.name:
                value = torch.ones(sizes, dtype=spec.dtype)
            else:
                value = torch.randint(0, 2, sizes, generator=noise).to(spec.dtype)
            made.append(value.to(like.device))
        self.check_inputs(made)
        return tuple(made)

    def check_inputs(self, values: Sequence[Any]) -> None:
        """Refuse inputs of another number, rank or size than the file's."""
        if len(values) != len(self.specs):
            raise SecateurError(
                f"got {len(values)} inputs, the file takes {len(self.specs)}: {', '.join(map(str, self.specs))}",
                where="inputs",
            )
        for spec, value in zip(self.specs, values, strict=True):
            if not isinstance(value, Tensor):
                continue
            fits = value.dim() == len(spec.shape) and all(
                not isinstance(n, int) or n == m for n, m in zip(spec.shape, value.shape, strict=True)
            )
            if not fits:
                raise SecateurError(
                    f"got the shape {list(value.shape)}, the file takes {spec}",
                    where=f"input {spec.name}",
                    fix="give an input of that shape; sizes that the file fixes cannot change",
                )

    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
        """Positional and keyword arguments in the order of the file's inputs."""
        if len(args) == 1 and not kwargs and isinstance(args[0], Mapping):
            kwargs, args = args[0], ()
        named = dict(zip((spec.name for spec in self.specs), args, strict=False)) | dict(kwargs)
        unknown = [name for name in kwargs if name not in {spec.name for spec in self.specs}]
        missing = [spec.name for spec in self.specs if spec.name not in named]
        if unknown or missing or len(args) > len(self.specs):
            raise SecateurError(
                f"got {len(args)} inputs and the names {sorted(kwargs)}, the file takes "
                + ", ".join(map(str, self.specs)),
                where="inputs",
            )
        values = [named[spec.name] for spec in self.specs]
        self.check_inputs(values)
        return values


def parse_shapes(text: str | None, specs: Sequence[Spec]) -> dict[str, list[int]]:
    """`1,3,64,64` for every input of that rank, or `name:1,16;other:1,16`."""
    found: dict[str, list[int]] = {}
    if not text:
        return found
    for part in text.split(";"):
        name, colon, sizes = part.rpartition(":")
        try:
            numbers = [int(n) for n in re.split(r"[,x]", sizes)]
            if min(numbers) < 1:
                raise ValueError(sizes)
        except ValueError:
            raise SecateurError(
                f"{sizes!r} isn't a shape",
                where="--input-shape",
                fix=f"write sizes such as {_suggest(specs)}",
            ) from None
        if colon and name.strip() not in {spec.name for spec in specs}:
            raise SecateurError(
                f"the file has no input {name.strip()!r}",
                where="--input-shape",
                fix=f"its inputs are {', '.join(map(str, specs))}",
            )
        fitting = [s for s in specs if (s.name == name.strip() if colon else len(s.shape) == len(numbers))]
        if not fitting:
            raise SecateurError(
                f"no input has {len(numbers)} sizes",
                where="--input-shape",
                fix=f"the inputs are {', '.join(map(str, specs))}",
            )
        found |= {spec.name: numbers for spec in fitting}
    return found


def _suggest(specs: Sequence[Spec]) -> str:
    shapes = [
        ",".join(str(n) if isinstance(n, int) else ("1" if k == 0 else "16") for k, n in enumerate(s.shape))
        for s in specs
    ]
    if len(set(shapes)) == 1:
        return shapes[0]
    return "'" + ";".join(f"{s.name}:{shape}" for s, shape in zip(specs, shapes, strict=True)) + "'"


def register(root: nn.Module, path: str, value: Tensor, parameter: bool) -> str:
    """Put a tensor at a dotted path, making the modules on the way; gives the path where it really is."""
    *parents, leaf = [re.sub(r"\W", "_", part) or "_" for part in path.split(".")]
    module = root
    done: list[str] = []
    for part in parents:
        while part not in module._modules and hasattr(module, part):
            part += "_"
        if part not in module._modules:
            module.add_module(part, nn.Module())
        done.append(part)
        module = module._modules[part]  # type: ignore[assignment]
    number, name = 2, leaf
    while hasattr(module, name):
        name, number = f"{leaf}_{number}", number + 1
    if parameter:
        module.register_parameter(name, nn.Parameter(value, requires_grad=value.is_floating_point()))
    else:
        module.register_buffer(name, value)
    return ".".join([*done, name])


def add_step(root: nn.Module, name: str, step: nn.Module) -> str:
    """Put the module of an operation under `ops`; gives its path."""
    if "ops" not in root._modules:
        root.add_module("ops", nn.Module())
    ops = root._modules["ops"]
    assert ops is not None
    name = re.sub(r"\W+", "_", name).strip("_") or "op"
    base, number = name, 2
    while hasattr(ops, name):
        name, number = f"{base}_{number}", number + 1
    ops.add_module(name, step)
    return f"ops.{name}"


def tensor_at(root: nn.Module, path: str) -> Tensor:
    parent, _, leaf = path.rpartition(".")
    return getattr(root.get_submodule(parent), leaf)


def largest_difference(
    got: Sequence[Tensor], expected: Sequence[Tensor], where: str, tolerance: float = 1e-4
) -> float:
    """The largest |got - expected| relative to the largest expected value (at least 1); raises above `tolerance`."""
    worst = 0.0
    if len(got) != len(expected):
        raise SecateurError(f"gives {len(got)} outputs, the module {len(expected)}", where=where)
    for a, b in zip(got, expected, strict=True):
        if a.shape != b.shape:
            raise SecateurError(
                f"gives an output of shape {list(a.shape)}, the module {list(b.shape)}", where=where
            )
        if not b.numel():
            continue
        a, b = a.detach().cpu().double(), b.detach().cpu().double()
        both = torch.isfinite(b)
        if not torch.equal(both, torch.isfinite(a)):
            raise SecateurError("gives infinite values where the module does not, or NaN", where=where)
        if both.any():
            worst = max(worst, float((a - b)[both].abs().max() / b[both].abs().max().clamp(min=1.0)))
    if worst > tolerance:
        raise SecateurError(
            f"its outputs differ from the module's by {worst:.2g} (allowed: {tolerance:g})", where=where
        )
    return worst
