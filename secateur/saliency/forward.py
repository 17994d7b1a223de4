"""A model as captum calls it: a function from inputs to logits, while the model stays as it was."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import SecateurError
from secateur.saliency.record import as_targets, undisturbed
from secateur.utils.running import logits_of


@contextlib.contextmanager
def forward_of(
    model: nn.Module, image: Tensor, target: Any
) -> Iterator[tuple[Callable[[Tensor], Tensor], Tensor, Tensor]]:
    """(f, x, targets): f(x [N, ...]) are the model's logits [N, classes], x is the image on its device and in its dtype.

    >>> with forward_of(resnet, image, None) as (f, x, targets):  # doctest: +SKIP
    ...     captum.attr.IntegratedGradients(f).attribute(x, target=targets)

    Eval mode, and parameters without gradients, inside. Raises `SecateurError` as `as_targets` does.
    """
    first = next(model.parameters(), image)
    with undisturbed(model):

        def f(x: Tensor) -> Tensor:
            return logits_of(model(x.to(first.dtype)))  # captum draws noise in float32

        x = image.detach().to(first.device, first.dtype).clone()
        with torch.no_grad():
            targets = as_targets(target, f(x))
        yield f, x, targets


def captum() -> Any:
    """`captum.attr`.

    Raises `SecateurError` where captum isn't installed.
    """
    try:
        return importlib.import_module("captum.attr")
    except ImportError as error:
        raise SecateurError(
            "captum isn't installed", where="saliency", fix="pip install 'secateur[saliency]'"
        ) from error
