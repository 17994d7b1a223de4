"""`train_tokens`: the modules of a token method, trained on the one training loop inside an attached model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import SecateurError
from secateur.families.vlm import facts_of, family_of
from secateur.method import Method, expect, make_method
from secateur.tokens.attach import Attached
from secateur.tokens.counts import amount_of
from secateur.tokens.method import Lesson, TokenMethod
from secateur.tokens.modules import Trained, made
from secateur.tokens.setup import make_setup
from secateur.training.batches import Augment, Draw, length
from secateur.training.fit import fit
from secateur.training.recipe import Recipe
from secateur.training.train_prune import claim
from secateur.utils.random import seed_of
from secateur.utils.running import device_of, evaluating, frozen_weights

RECIPE = Recipe(batch=32)


def train_tokens(
    model: nn.Module,
    method: str | Method | type[Method],
    *,
    data: Any,
    target: Any,
    steps: int | None = None,
    seed: int = 0,
    frozen: bool = True,
    weights: Trained | None = None,
    augment: Augment | None = None,
    recipe: Recipe = RECIPE,
    directory: str | Path | None = None,
    every: int = 100,
    given: dict[str, Any] | None = None,
    **hyperparameters: Any,
) -> Trained:
    """Trains the modules with which a token method chooses, for one model and target.

    >>> batches = [{**processor(...), "labels": ...}, ...]  # doctest: +SKIP
    >>> trained = secateur.train_tokens(vlm, "covipal", data=batches, target="25%")  # doctest: +SKIP
    >>> trained.save("scorer")  # doctest: +SKIP
    >>> secateur.attach(vlm, "covipal", weights="scorer", target="25%")  # doctest: +SKIP

    Args:
        model: a vision-language model.
        method: a token method with modules: its name, class or an instance.
        data: keyword arguments of the model's `forward` with `labels`: a list of ready batches, or a dict of tensors whose
            first axis is the samples. Prompts with their answers; labels are -100 but for the answers, which the modules never see.
        target: the share of the visual tokens that is to stay ("25%"), or their number per image ("tokens=64").
        steps: of each lesson of the method; None: once over the data.
        seed: of the modules' weights and the order of the data.
        frozen: the model's own weights stay, and it is in eval mode; else they are trained with the modules, in place.
        weights: of an earlier training, to go on from.
        augment: `(batch, generator) -> batch`, on the model's device: what `data` holds becomes arguments of `forward`.
        recipe: optimiser, rate, batch and schedule, as for `fit`.
        directory: what a stopped run needs to go on: the same call goes on to the same bits. every: steps between checkpoints.
        given: what stages read as `sets.given`.
        **hyperparameters: fields of the method.

    Returns:
        The weights, to be saved or given to `attach`.

    Raises:
        SecateurError: a method without modules, a model or data that can't work, a directory of another run; the model is then
            as it was, but for steps of a training that isn't frozen.
    """
    chosen = make_method(method, **hyperparameters)
    expect(chosen, "attach", "train_tokens")
    assert isinstance(chosen, TokenMethod)
    facts, amount = facts_of(model, family_of(model)), amount_of(target)
    if not facts.layers:
        raise SecateurError(
            "a vision transformer on its own reads no question",
            where="train_tokens",
            fix="a vision-language model",
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(seed, "modules"))
        modules = made(chosen, facts, model)
    if modules is None:
        raise SecateurError(f"{chosen.name} has no modules to train", where="train_tokens", fix="attach it")
    if amount == 1.0:
        raise SecateurError("at 100% no token leaves", where="target", fix="such as 25%")
    if weights is not None:
        weights.hyperparameters(type(chosen))
        weights.fill(modules, facts)
    modules.to(device_of(model))
    count = steps or max(1, round(length(data) / (1 if isinstance(data, list) else recipe.batch)))
    identity = {
        "method": chosen.name,
        **chosen.hyperparameters,
        "target": amount,
        "steps": count,
        "seed": seed,
    }
    identity |= {"frozen": frozen, "data": Draw(data, recipe.batch, seed).fingerprint}
    folder = Path(directory).expanduser() if directory is not None else None
    claim(folder, identity | dataclasses.asdict(recipe))

    learner = modules if frozen else nn.ModuleList([modules, model])
    about: dict[str, Any] = {"seed": seed, "frozen": frozen, "lessons": []}
    with evaluating(model), frozen_weights(model) if frozen else nullcontext():
        for lesson in chosen.lessons(facts):
            setup = make_setup(
                model, chosen, target=amount, seed=seed, given=given, modules=modules, lesson=lesson
            )
            with Attached(setup) as attached:
                losses = fit(
                    learner,
                    data,
                    steps=count,
                    loss=objective(attached, lesson),
                    augment=augment,
                    seed=seed,
                    recipe=recipe,
                    checkpoint=folder / f"{lesson.name}.safetensors" if folder is not None else None,
                    every=every,
                    about={"lesson": lesson.name, **identity},
                    description=lesson.name,
                )
            part = losses[-max(1, count // 10) :]
            about["lessons"].append(
                {"name": lesson.name, "steps": count, "first": losses[0], "last": sum(part) / len(part)}
            )
    return Trained(
        method=chosen.name,
        settings=chosen.hyperparameters,
        target=amount,
        model=type(model).__name__,
        layers=facts.layers,
        hidden=facts.hidden,
        heads=facts.heads,
        state={name: tensor.detach().cpu().clone() for name, tensor in modules.state_dict().items()},
        about=about,
    )


def objective(attached: Attached, lesson: Lesson) -> Callable[[nn.Module, Any], Tensor]:
    """The loss of a lesson, as `fit` calls it: a forward of the attached model, and what its stages noted."""

    def loss(learner: nn.Module, batch: Any) -> Tensor:
        if not hasattr(batch, "keys") or batch.get("labels") is None:
            raise SecateurError(
                "a batch has no labels", where="data", fix="keyword arguments of forward, with labels"
            )
        own = attached.model(**batch, use_cache=False).loss
        if not attached.noted:
            raise SecateurError("a batch has no picture", where="data", fix="leave out what has none")
        return lesson.loss(attached.noted, own)

    return loss
