"""Pipelines of diffusers as a task, for methods that learn from what a model draws."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from secateur.errors import SecateurError
from secateur.families.pipelines import Parts
from secateur.training.recipe import Recipe
from secateur.training.sampling import Sampler
from secateur.training.task import Task
from secateur.utils.inputs import Inputs

SAMPLES, EPOCHS = 100, 4
"""Published for EcoDiff: 100 prompts, four times each, four in a step."""


def pipeline_task(
    parts: Parts, inputs: Inputs | None = None, quality: Callable[[nn.Module], float] | None = None
) -> Task:
    """A task whose network is the parts of a pipeline, and whose sampler is the pipeline's own loop.

    >>> train_prune(pipeline_task(Parts(pipe, ["a red house"])), method="ecodiff", target="80%")  # doctest: +SKIP

    The loop is one step of the `Sampler`: within it each call of a part keeps its arguments alone.

    Raises `SecateurError` where two drawings from one seed differ, or a drawing has no gradient.
    """
    parts.check_sampler()
    build = lambda: copy.deepcopy(parts).eval()
    return Task(
        type(parts.pipeline).__name__,
        build,
        (parts.seeds(SAMPLES, 0), torch.arange(SAMPLES)),
        quality,
        parts.example_inputs() if inputs is None else inputs,
        loss=_no_loss,
        pretrained=build,
        recipe=Recipe(optimizer="adamw", batch=4),
        epochs=EPOCHS,
        sampler=Sampler(
            1, lambda count, seed: (parts.seeds(count, seed), torch.arange(count)), _whole, at_once=4
        ),
    )


def _whole(model: nn.Module, seeds: Tensor, number: int, asked: Any) -> Tensor:
    """All steps of the pipeline that the model, or the model behind the gates, belongs to."""
    parts = next(module for module in model.modules() if isinstance(module, Parts))
    return parts.draw(seeds, asked, through=model)


def _no_loss(model: nn.Module, batch: Any) -> NoReturn:
    raise SecateurError(
        "a pipeline brings no data and no loss to train its weights by",
        where="train_prune",
        fix="a method that learns from drawings, such as ecodiff, or data= and loss=",
    )
