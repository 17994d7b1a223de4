"""What is put on a model so that it skips, and taken off again."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Self

from torch import nn

from secateur.errors import SecateurError
from secateur.skipping.work import Work

_ATTACHED: weakref.WeakKeyDictionary[nn.Module, Skipping] = weakref.WeakKeyDictionary()


class Skipping:
    """A model that skips until `detach` or the end of the `with` block. `work`: what the last run cost.

    >>> with secateur.attach(model, "dtop", p0=0.9) as attached:  # doctest: +SKIP
    ...     logits = model(pictures)
    >>> attached.work.share  # doctest: +SKIP

    `name`: of the method. Raises `SecateurError` where something is attached to the model already.
    """

    name: str

    def __init__(self, model: nn.Module, name: str):
        if model in _ATTACHED:
            raise SecateurError(
                f"{_ATTACHED[model].name} is attached to this model already",
                where="attach",
                fix="detach it first",
            )
        self.model, self.name, self.work = model, name, Work()
        self.undo: list[Callable[[], None]] = [lambda: _forget(model)]
        _ATTACHED[model] = self

    def __repr__(self) -> str:
        return f"Skipping: {self.name} {'on' if self.undo else 'taken off'} {type(self.model).__name__}"

    def put(self, module: nn.Module, name: str, value: object) -> None:
        """An attribute of the instance, until `detach`; one that it has of its own comes back."""
        missing = object()
        own = module.__dict__.get(name, missing)
        object.__setattr__(module, name, value)
        self.undo.append(
            lambda: (
                module.__dict__.pop(name, None) if own is missing else object.__setattr__(module, name, own)
            )
        )

    def detach(self) -> None:
        """The model is as it was, bit for bit. Twice is once."""
        while self.undo:
            self.undo.pop()()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.detach()


def attached_to(model: nn.Module) -> Skipping | None:
    """What skips in a model now."""
    return _ATTACHED.get(model)


def _forget(model: nn.Module) -> None:
    _ATTACHED.pop(model, None)
