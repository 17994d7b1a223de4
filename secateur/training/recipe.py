"""A recipe: how a network is trained. Its fields are keywords of `fit` and flags of the command line."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from secateur.errors import SecateurError, choose

OPTIMIZERS = ("sgd", "adam", "adamw")
SCHEDULES = ("cosine", "milestones", "linear", "constant")
PRECISIONS = ("auto", "bfloat16", "float32")


@dataclass(frozen=True)
class Recipe:
    """Optimiser, rate, batch and schedule.

    >>> Recipe(optimizer="sgd", lr=0.1, batch=128, lr_schedule="milestones", milestones=(0.5, 0.75)).rate(60, 100)
    0.010000000000000002

    The defaults suit fine-tuning; a task has its own. Raises `SecateurError` for a value that can't be meant.
    """

    optimizer: str = field(default="adamw", metadata={"help": ", ".join(OPTIMIZERS)})
    lr: float = field(default=1e-4, metadata={"help": "highest learning rate"})
    batch: int = field(default=8, metadata={"help": "samples in a step, over all processes"})
    momentum: float = field(default=0.9, metadata={"help": "of sgd"})
    nesterov: bool = field(default=False, metadata={"help": "Nesterov's momentum, for sgd"})
    betas: tuple[float, float] = field(default=(0.9, 0.999), metadata={"help": "of adam and adamw"})
    weight_decay: float = field(default=0.0, metadata={"help": "weight decay; adamw's is decoupled"})
    decay: str = field(
        default="matrices", metadata={"help": "what decays: matrices (two or more axes), or all tensors"}
    )
    lr_schedule: str = field(default="cosine", metadata={"help": ", ".join(SCHEDULES)})
    milestones: tuple[float, ...] = field(
        default=(0.5, 0.75),
        metadata={"help": "shares of the run after which the rate is multiplied by gamma"},
    )
    gamma: float = field(default=0.1, metadata={"help": "factor at a milestone"})
    warmup: float = field(default=0.1, metadata={"help": "share of the steps in which the rate rises"})
    clip: float = field(default=1.0, metadata={"help": "largest norm of the gradient; 0: off"})
    precision: str = field(
        default="auto", metadata={"help": f"{', '.join(PRECISIONS)}; auto: bf16 where an accelerator has it"}
    )

    def __post_init__(self) -> None:
        for name in ("betas", "milestones"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        known = {
            "optimizer": OPTIMIZERS,
            "lr_schedule": SCHEDULES,
            "decay": ("matrices", "all"),
            "precision": PRECISIONS,
        }
        for name, choices in known.items():
            choose(getattr(self, name), choices, what=name, where=name)
        if self.batch < 1:
            raise SecateurError(
                f"{self.batch} is less than 1", where="batch", fix="give a whole number from 1"
            )
        if not (self.lr > 0 and math.isfinite(self.lr)):
            raise SecateurError(f"{self.lr} isn't a learning rate", where="lr", fix="such as 1e-4")
        if not 0 <= self.warmup <= 1:
            raise SecateurError(
                f"{self.warmup} is outside 0..1", where="warmup", fix="the share of the steps, such as 0.1"
            )
        for name in ("momentum", "weight_decay", "clip"):
            if not (getattr(self, name) >= 0 and math.isfinite(getattr(self, name))):
                raise SecateurError(f"{getattr(self, name)} is below 0", where=name, fix="give 0 or more")
        if self.nesterov and not self.momentum:
            raise SecateurError("Nesterov needs a momentum", where="nesterov", fix="such as momentum=0.9")

    def replace(self, **changes: Any) -> Recipe:
        """Another recipe; an unknown field is an error that names the nearest."""
        names = [f.name for f in dataclasses.fields(self)]
        for key in changes:
            fix = f"its fields are {', '.join(names)}"
            choose(key, names, what="setting", where="training", near=1, fix=fix)
        return dataclasses.replace(self, **changes)

    def rate(self, step: int, steps: int) -> float:
        """The learning rate of a step, before the factors of parameter groups."""
        return self.lr * self.factor(step, steps)

    def factor(self, step: int, steps: int) -> float:
        """The share of `lr` at a step: linear up over the warm-up, times the schedule."""
        rise = round(self.warmup * steps)
        if self.lr_schedule == "milestones":
            passed = sum(step >= round(share * steps) for share in self.milestones)
            return min(1.0, (step + 1) / max(1, rise)) * self.gamma**passed
        if step < rise:
            return (step + 1) / rise
        done = (step - rise) / max(1, steps - rise)
        if self.lr_schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * done))
        return 1 - done if self.lr_schedule == "linear" else 1.0

    def make_optimizer(
        self, model: nn.Module, parameters: Iterable[Any] | None = None
    ) -> torch.optim.Optimizer:
        """The optimiser over tensors or parameter groups; None: all parameters that require a gradient."""
        groups = _groups(model, parameters, self.weight_decay, self.decay == "all")
        if self.optimizer == "sgd":
            return torch.optim.SGD(
                groups, lr=self.lr, momentum=self.momentum, nesterov=self.nesterov, weight_decay=0.0
            )
        made = torch.optim.Adam if self.optimizer == "adam" else torch.optim.AdamW
        return made(groups, lr=self.lr, betas=self.betas, weight_decay=0.0)


RECIPE = Recipe()


def schedule(step: int, steps: int, warmup: float = 0.1) -> float:
    """The share of the learning rate at a step: linear up over `warmup * steps` steps, then half a cosine to 0.

    >>> [round(schedule(step, 10, 0.2), 3) for step in (0, 1, 2, 6, 9)]
    [0.5, 1.0, 1.0, 0.5, 0.038]
    """
    return RECIPE.replace(warmup=warmup).factor(step, steps)


def autocast(device: torch.device, precision: str = "auto") -> AbstractContextManager:
    """bf16 autocast where it is asked for, or where the device is an accelerator that computes in it."""
    capable = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if precision == "bfloat16" or (precision == "auto" and capable):
        return torch.autocast(device.type, torch.bfloat16)
    return nullcontext()


def _groups(
    model: nn.Module, parameters: Iterable[Any] | None, decay: float, everything: bool
) -> list[dict[str, Any]]:
    given: Sequence[Any] = list(model.parameters() if parameters is None else parameters)
    if given and isinstance(given[0], dict):
        return [{"weight_decay": decay, **group} for group in given]
    trained = [p for p in given if p.requires_grad]
    if not trained:
        raise SecateurError(
            "no parameter requires a gradient", where=type(model).__name__, fix="call model.requires_grad_()"
        )
    if everything:
        return [{"params": trained, "weight_decay": decay}]
    split = ([p for p in trained if p.ndim >= 2], decay), ([p for p in trained if p.ndim < 2], 0.0)
    return [{"params": params, "weight_decay": value} for params, value in split if params]
