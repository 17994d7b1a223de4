"""One training loop: seeded, resumable to the bit, with hooks; bf16 where the device has it, DDP under `torchrun`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import SecateurError
from secateur.training import parallel
from secateur.training.batches import Augment, Draw, digest, step_seed
from secateur.training.checkpoint import Moments, load_moments, read_checkpoint, write_checkpoint
from secateur.training.finite import Watch
from secateur.training.losses import checked_loss, default_loss, next_token_loss
from secateur.training.recipe import RECIPE, Recipe, autocast, schedule
from secateur.training.sharded import full
from secateur.training.state import Hook, State
from secateur.utils.inputs import map_tensors
from secateur.utils.progress import bar
from secateur.utils.types import Objective

__all__ = ["Draw", "Hook", "State", "default_loss", "fit", "next_token_loss", "schedule"]


def fit(
    model: nn.Module,
    data: Any,
    *,
    steps: int,
    start: int = 0,
    until: int | None = None,
    loss: Objective | None = None,
    loss_terms: Sequence[Objective] = (),
    after_backward: Sequence[Hook] = (),
    after_step: Sequence[Hook] = (),
    parameters: Iterable[Any] | None = None,
    augment: Augment | None = None,
    seed: int = 0,
    moments: Moments | None = None,
    recipe: Recipe = RECIPE,
    checkpoint: str | Path | None = None,
    every: int = 100,
    about: Mapping[str, Any] | None = None,
    at_end: Hook | None = None,
    description: str = "training",
    **changes: Any,
) -> list[float]:
    """Train `model` in place for `steps` steps; gives the loss of each.

    >>> losses = fit(model, token_ids, steps=100, lr=1e-4)  # doctest: +SKIP
    >>> losses = fit(net, (images, labels), steps=100, checkpoint="run.safetensors", every=20)  # doctest: +SKIP

    data: token ids [samples, length], a tuple or dict of tensors whose first axis is the samples, or a list of ready
    batches (then `batch` is not used). Samples are drawn in a seeded order, each once an epoch.
    start, until: only the steps start..until-1 of the run; the rate, the batches and their augmentation at a step are
    those of the whole run.
    loss: `(model, batch) -> scalar`; None: next-token loss for ids, cross-entropy of `model(x)` for a pair (x, labels),
    the model's own loss for a dict. loss_terms: more of the same, added to it.
    after_backward: hooks that run on the gradients, before clipping. after_step: hooks that run on the new weights.
    A hook with `state_dict()` and `load_state_dict(dict)` is kept in checkpoints.
    parameters: tensors or the optimiser's parameter groups; None: all of the model's that require a gradient.
    augment: `(batch, generator) -> batch`, on the model's device.
    seed: decides order, augmentation and dropout; torch's random state is set from it and the step before each step.
    moments: the optimiser's state to begin with; None: fresh.
    recipe, changes: optimiser, rate, batch and schedule (`Recipe`); a field as a keyword wins.
    checkpoint: a file, written every `every` steps and at the end. A run that finds it goes on from there, and ends
    with the same bits as one that was never stopped (same machine, same settings). about: what else decides the
    result, so that the checkpoint of another run is refused. at_end: called with the state, after the last step or where
    a finished run was read.

    Under `torchrun` every process takes its share of each batch and gradients are averaged: the result is that of one
    process to float tolerance; so it is where the model is one of `secateur.training.sharded.shard`. BatchNorm then normalises over each process's share, and dropout differs.

    Raises `SecateurError`: a loss or gradient that isn't finite (naming the step and the layer; the weights are those
    of the step before, the last checkpoint stays), nothing to train, no data, labels that the model has no output
    for, a checkpoint of another model or other settings.
    """
    recipe = recipe.replace(**changes)
    until = steps if until is None else until
    _check(steps, start, until, every)
    draw = Draw(data, recipe.batch, seed)
    optimizer = recipe.make_optimizer(model, parameters)
    factors = [group["lr"] for group in optimizer.param_groups]
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    device = trained[0].device
    rank, size = parallel.join(device)
    if moments is not None:
        load_moments(optimizer, moments)
    state = State(model, optimizer, steps, start)
    hooks = [hook for hook in (*after_backward, *after_step) if hasattr(hook, "state_dict")]
    file = Path(checkpoint) if checkpoint else None
    settings = {"model": _names(model, trained), "data": draw.fingerprint if file else "", **(about or {})}
    settings |= {"hooks": [type(hook).__name__ for hook in hooks]}
    settings |= {"steps": steps, "start": start, "until": until, "seed": seed, **dataclasses.asdict(recipe)}
    modes = {module: module.training for module in model.modules()}
    total_loss = parallel.wrap(model, [loss or checked_loss(data), *loss_terms], trained, size)
    watch = Watch(model, file)
    devices, cudnn = ([device] if device.type == "cuda" else []), torch.backends.cudnn
    exact, cudnn.deterministic = cudnn.deterministic, cudnn.deterministic or bool(devices)
    with torch.random.fork_rng(devices=devices), bar(description, until - start) as advance:
        model.train()
        try:
            if file and file.exists():
                read_checkpoint(file, state, trained, settings, hooks)
                advance(state.step - start)
            while state.step < until:
                torch.manual_seed(step_seed(seed, state.step, rank))
                watch.remember(state.step)
                state.lr = recipe.rate(state.step, steps)
                for group, rate in zip(optimizer.param_groups, factors):
                    group["lr"] = rate * recipe.factor(state.step, steps)
                batch = map_tensors(draw(state.step), lambda t: t.to(device, non_blocking=True))
                if augment is not None:
                    generator = torch.Generator().manual_seed(step_seed(seed, state.step))
                    batch = augment(batch, generator)
                state.batch = parallel.part(batch, rank, size)
                with autocast(device, recipe.precision):
                    total = total_loss(state.batch)
                state.loss = parallel.mean(total, size).item()
                watch.loss(state.loss, lambda: total_loss(state.batch))
                optimizer.zero_grad()
                total.backward()
                for hook in after_backward:
                    hook(state)
                norm = full(torch.nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None]))
                watch.gradient(norm.item(), trained)
                if recipe.clip:
                    torch.nn.utils.clip_grads_with_norm_(trained, recipe.clip, norm)
                optimizer.step()
                for hook in after_step:
                    hook(state)
                state.losses.append(state.loss)
                state.step += 1
                if file and ((state.step - start) % every == 0 or state.step == until):
                    write_checkpoint(file, state, trained, settings, hooks, write=rank == 0)
                    parallel.barrier(size)
                advance(1)
            if at_end is not None:
                at_end(state)
        finally:
            cudnn.deterministic = exact
            optimizer.zero_grad()
            for module, mode in modes.items():
                module.training = mode
    return state.losses


def _check(steps: int, start: int, until: int, every: int) -> None:
    for name, value in (("steps", steps), ("every", every)):
        if value < 1:
            raise SecateurError(f"{value} is less than 1", where=name, fix="give a whole number from 1")
    if not 0 <= start <= until <= steps:
        raise SecateurError(
            f"steps {start} to {until} aren't a part of {steps}",
            where="start, until",
            fix="0 <= start <= until",
        )


def _names(model: nn.Module, trained: Sequence[Tensor]) -> str:
    """A digest of which tensors of which shapes are trained, and of the model's buffers."""
    names = {id(p): name for name, p in model.named_parameters()}
    tensors = [[names.get(id(p), ""), list(p.shape)] for p in trained]
    return digest(tensors + [[name, list(b.shape)] for name, b in model.named_buffers()])
