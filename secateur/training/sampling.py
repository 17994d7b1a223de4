"""Generative models that draw in steps, and gradients through all of them in the memory of one."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from secateur.errors import SecateurError
from secateur.utils.inputs import Inputs, map_tensors
from secateur.utils.running import evaluating

Start = Callable[[int, int], tuple[Tensor, Any]]
Step = Callable[[nn.Module, Tensor, int, Any], Tensor]


@dataclass(frozen=True)
class Sampler:
    """How a model draws: from noise, in steps.

    >>> sampler = Sampler(3, lambda count, seed: (torch.full((count,), 2.0), None), lambda m, z, i, c: 1.1 * m(z))
    >>> sample(nn.Identity(), sampler, *sampler.start(1, 0))
    tensor([2.6620])

    steps: how many, each of which keeps its input alone while gradients are taken; a single one is run as it is. start: (count, seed) -> noise and what is asked for (classes, prompts), a function of the seed.
    step: (model, state, number of the step, what is asked for) -> the next state. Noise within a step comes from torch's
    global random state. at_once: drawings that are made together where no gradient is taken.
    """

    steps: int
    start: Start
    step: Step
    at_once: int = 100


def sample(model: nn.Module, sampler: Sampler, state: Tensor, asked: Any) -> Tensor:
    """The state after all steps.

    With gradients on, each step keeps its input alone and is run again on the way back, with the random numbers it had:
    memory for one step's activations and all states, one extra forward (EcoDiff, arXiv 2412.02852, section 3).
    """
    for number in range(sampler.steps):
        if torch.is_grad_enabled() and sampler.steps > 1:
            state = checkpoint(
                sampler.step, model, state, number, asked, use_reentrant=False, preserve_rng_state=True
            )
        else:
            state = sampler.step(model, state, number, asked)
    return state


@torch.no_grad()
def draw(
    model: nn.Module, sampler: Sampler, count: int, seed: int, batch: int | None = None
) -> tuple[Tensor, Any]:
    """`count` drawings without gradients, and what was asked for.

    Raises `SecateurError` where the sampler isn't a function of its seed.
    """
    noise, asked = sampler.start(count, seed)
    again, _ = sampler.start(count, seed)
    if not torch.equal(noise, again):
        raise SecateurError(
            "two starts from one seed differ", where="sampler", fix="draw its noise from a seeded generator"
        )
    device = next(model.parameters()).device
    batch = batch or sampler.at_once
    pieces = [
        sample(model, sampler, part.to(device), _part(asked, i * batch, len(part), device)).cpu()
        for i, part in enumerate(noise.split(batch))
    ]
    return torch.cat(pieces), asked


def _part(asked: Any, start: int, count: int, device: torch.device) -> Any:
    return asked[start : start + count].to(device) if isinstance(asked, Tensor) else asked


def visited(model: nn.Module, sampler: Sampler, count: int, seed: int) -> list[Inputs]:
    """What the model is given while it makes `count` drawings, one batch a call: calibration data of a model that draws.

    >>> data = visited(model, sampler, 20, seed=0)  # doctest: +SKIP
    >>> secateur.prune(model, method="wanda", target="60%", everywhere=True, data=data)  # doctest: +SKIP

    All steps are there, and of guidance all branches, as often as the sampler runs the model on them. The model draws in eval
    mode. Raises `SecateurError` where the sampler isn't a function of its seed, or never calls the model.
    """
    seen: list[Inputs] = []

    def note(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        given = args if not kwargs else inspect.signature(module.forward).bind(*args, **kwargs).arguments
        seen.append(map_tensors(given, lambda tensor: tensor.detach().clone()))

    hook = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        with evaluating(model):
            draw(model, sampler, count, seed)
    finally:
        hook.remove()
    if not seen:
        raise SecateurError(
            "its steps never call the model", where="sampler", fix="call the model that is given to `step`"
        )
    return seen
