"""A second optimiser in one training: other parameters, another loss, another half of the data, after each step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import SecateurError
from secateur.training.batches import Augment, Draw, length, step_seed, take
from secateur.training.checkpoint import load_moments
from secateur.training.recipe import Recipe, autocast
from secateur.training.state import State
from secateur.utils.inputs import map_tensors
from secateur.utils.types import Objective


class Second:
    """A hook for `after_step`: one step of its own optimiser on a batch of its own data.

    >>> shape = Second(net, [net.widths], data=(x[half:], y[half:]), loss=cost, recipe=Recipe(optimizer="adam", lr=1e-3))  # doctest: +SKIP
    >>> fit(net, (x[:half], y[:half]), parameters=weights, after_step=[shape], steps=100)  # doctest: +SKIP

    The upper half of a bilevel search (weights on one half of the data, architecture on the other). Only `parameters` get
    a gradient from its loss. Batches are a function of the seed and the step; parameters and moments are kept in the
    checkpoints of the training, so a killed run ends with the same bits. Rates follow the recipe's schedule over the
    steps of the training. For one process.

    Raises `SecateurError` where its loss isn't finite, naming the step.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Sequence[nn.Parameter],
        *,
        data: Any,
        loss: Objective,
        recipe: Recipe,
        seed: int = 0,
        augment: Augment | None = None,
    ):
        self.model, self.parameters, self.loss, self.recipe = model, list(parameters), loss, recipe
        self.draw, self.seed, self.augment = Draw(data, recipe.batch, seed + 1), seed, augment
        self.optimizer = recipe.make_optimizer(model, self.parameters)
        self.losses: list[float] = []

    def __call__(self, state: State) -> None:
        device = self.parameters[0].device
        torch.manual_seed(step_seed(self.seed + 1, state.step))
        batch = map_tensors(self.draw(state.step), lambda t: t.to(device, non_blocking=True))
        if self.augment is not None:
            batch = self.augment(batch, torch.Generator().manual_seed(step_seed(self.seed + 1, state.step)))
        with autocast(device, self.recipe.precision):
            loss = self.loss(self.model, batch)
        self.losses.append(loss.item())
        if not math.isfinite(self.losses[-1]):
            raise SecateurError(
                f"the loss of the second optimiser is {self.losses[-1]} at step {state.step}",
                where="training",
                fix="lower its lr",
            )
        grads = torch.autograd.grad(loss, self.parameters, allow_unused=True)
        for parameter, grad in zip(self.parameters, grads, strict=True):
            parameter.grad = grad
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.rate(state.step, state.steps)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        """Parameters and moments, flat."""
        state: dict[str, Any] = {f"parameter/{i}": p.detach() for i, p in enumerate(self.parameters)}
        for i, moments in self.optimizer.state_dict()["state"].items():
            state |= {f"moment/{i}/{key}": value for key, value in moments.items()}
        return state

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Puts back what `state_dict` gave. Raises `SecateurError` where that was of other parameters."""
        shapes = {f"parameter/{i}": p.shape for i, p in enumerate(self.parameters)}
        if {n: v.shape for n, v in state.items() if n.startswith("parameter/")} != shapes:
            raise SecateurError(
                "its second optimiser trained other parameters",
                where="checkpoint",
                fix="use the same settings, or remove it to start anew",
            )
        moments: dict[int, dict[str, Tensor]] = {}
        for name, value in state.items():
            kind, _, rest = name.partition("/")
            number, _, key = rest.partition("/")
            if kind == "parameter":
                self.parameters[int(number)].copy_(value)
            else:
                moments.setdefault(int(number), {})[key] = value
        load_moments(self.optimizer, moments)


def halves(data: Any, generator: torch.Generator) -> tuple[Any, Any]:
    """Two halves of the samples (or ready batches), divided by chance: one for each optimiser.

    >>> [half.shape for half in halves(torch.zeros(5, 3), torch.Generator())]
    [torch.Size([2, 3]), torch.Size([3, 3])]

    Raises `SecateurError` for fewer than two samples.
    """
    count = length(data)
    if count < 2:
        raise SecateurError("one sample has no halves", where="data", fix="give two samples or more")
    order = torch.randperm(count, generator=generator)
    return take(data, order[: count // 2]), take(data, order[count // 2 :])
