"""Units that leave in the middle of a phase of training: the optimiser's moments and the checkpoints follow."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from secateur.errors import SecateurError
from secateur.surgery import Shrinking
from secateur.training import parallel
from secateur.training.checkpoint import check_moments
from secateur.training.state import State
from secateur.utils.running import device_of

Decide = Callable[[State, Shrinking], Mapping[str, Tensor] | None]
"""After a step: the units to keep from now on, in the numbers of the dense model, or None; it may change weights too."""


class Cuts:
    """A hook for `after_step` that asks `decide` what to keep, and cuts the model there and then.

    >>> cuts = Cuts(Shrinking(model, graph), lambda state, now: {"fc1:neurons": torch.arange(60 - state.step)})  # doctest: +SKIP
    >>> fit(model, data, steps=50, after_step=[cuts], checkpoint="run.safetensors")  # doctest: +SKIP

    Moments lose the entries that their parameters lose, of any optimiser whose moments have the shape of the parameter;
    rates and steps go on. Checkpoints hold the kept units, so that a killed run goes on at its size, with the same bits.
    Where nothing leaves, training is what it is without the hook.

    Raises `SecateurError`: moments of another shape, several processes, a model behind gates or other wrappers.
    """

    def __init__(self, shrinking: Shrinking, decide: Decide):
        self.shrinking, self.decide = shrinking, decide

    def __call__(self, state: State) -> None:
        if (keep := self.decide(state, self.shrinking)) is not None:
            self.to(state, keep)

    @torch.no_grad()
    def to(self, state: State, keep: Mapping[str, Tensor]) -> None:
        """Cut to these units, model and moments."""
        model, optimizer = self.shrinking.model, state.optimizer
        if state.model is not model:
            raise SecateurError(
                f"what trains is a {type(state.model).__name__} and not the model itself",
                where="cuts in training",
                fix="train the model without gates around it, or cut between phases",
            )
        if parallel.join(device_of(model))[1] > 1:
            raise SecateurError(
                "processes that share a batch can't change the model's size on the way",
                where="cuts in training",
                fix="train in one process, or cut between phases",
            )
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        check_moments({i: optimizer.state.get(p, {}) for i, p in enumerate(trained)}, trained)
        shapes = {id(p): p.shape for p in trained}
        places = self.shrinking.to(keep)
        names = {id(p): name for name, p in model.named_parameters()}
        for parameter in trained:
            dims = places.get(names.get(id(parameter), ""), {})
            for key, value in optimizer.state.get(parameter, {}).items() if dims else ():
                if isinstance(value, Tensor) and value.shape == shapes[id(parameter)]:
                    for dim, place in dims.items():
                        value = value.index_select(dim, place.to(value.device))
                    optimizer.state[parameter][key] = value.contiguous()

    def state_dict(self) -> dict[str, Any]:
        return dict(self.shrinking.keep)

    def resize(self, state: State, values: Mapping[str, Any]) -> None:
        """The size that a checkpoint was written at; its tensors are read afterwards."""
        self.to(state, values)

    def load_state_dict(self, values: Mapping[str, Any]) -> None:
        """Nothing is left to do: `resize` came first."""
