"""Choices that rounding decides: where a model picks the best of values that are as good as equal."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from secateur.graph.source import source_line
from secateur.utils.inputs import Inputs
from secateur.utils.running import call, evaluating, without_cache

ROUNDING = 1e-5
"""Values closer than this share of the largest are ordered by rounding; in half precision, than four last digits."""
COUNTED = {"topk": None, "sort": None, "argsort": None, "argmax": 1, "argmin": 1}
"""How many of the values an operation takes; None: all, or as many as it is told."""


def ties(model: nn.Module, inputs: Inputs) -> list[str]:
    """The lines of the model that order values which differ by no more than rounding, on these inputs.

    >>> class Best(nn.Module):
    ...     def forward(self, x):
    ...         return x.topk(2).indices
    >>> [line.partition(" ")[0] for line in ties(Best(), torch.tensor([1.0, 1.0, 2.0, 0.0]))]
    ['topk']
    >>> ties(Best(), torch.tensor([1.0, 1.5, 2.0, 0.0]))
    []

    Two runtimes, or two orders of a sum, may choose differently there and both be right.
    """
    with _Choices() as seen, torch.no_grad(), evaluating(model), without_cache(model):
        call(model, inputs)
    return list(dict.fromkeys(seen.found))


class _Choices(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[1] if hasattr(func, "_schema") else ""
        if name in COUNTED and tied(name, func._schema.arguments, args, kwargs):
            self.found.append(f"{name} ({source_line()})")
        return func(*args, **kwargs)


def tied(name: str, arguments: Any, args: Any, kwargs: Any) -> bool:
    """Whether two values whose order this call tells are equal to rounding."""
    given = {a.name: a.default_value for a in arguments if a.has_default_value()}
    given |= dict(zip((a.name for a in arguments), args, strict=False)) | kwargs
    values: Tensor = given["self"]
    rounding = max(ROUNDING, 4 * torch.finfo(values.dtype).eps) if values.is_floating_point() else 0.0
    values = values.double()
    values = values.reshape(-1) if given.get("dim") is None else values.movedim(given["dim"], -1)
    smallest = name == "argmin" or given.get("largest") is False
    ordered = values.sort(-1, descending=not smallest).values
    if (count := given.get("k", COUNTED[name])) is not None:
        ordered = ordered[..., : count + 1]  # those that are taken, and the first that isn't
    gaps = ordered.diff(dim=-1).abs()
    return bool(gaps.numel()) and bool((gaps <= rounding * values.nan_to_num(0, 0, 0).abs().amax()).any())
