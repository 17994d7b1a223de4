"""What is checked of a model before it is pruned: that it runs on its example inputs, and does the same each time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn

from secateur.errors import SecateurError
from secateur.graph import Graph
from secateur.graph.notes import some_of
from secateur.utils.inputs import Inputs, describe
from secateur.utils.running import attributes_of, call, flat_tensors, put_back, without_cache

SEEDS = 5
"""Runs of a model that draws random numbers in evaluation mode."""


def check_forward(
    model: nn.Module,
    inputs: Inputs,
    steady: bool = True,
    again: Callable[[], bool] | None = None,
    around: AbstractContextManager | None = None,
) -> list[Tensor]:
    """Run the model, in evaluation mode, without gradients; the global random state stays as it was.

    >>> check_forward(nn.Linear(4, 2), torch.ones(1, 3))
    Traceback (most recent call last):
    secateur.errors.SecateurError: inputs: Linear fails on them (RuntimeError: mat1 and mat2 shapes cannot be multiplied ...

    steady: run it again, and five times where it draws random numbers, and compare. again: whether to do so where it draws
    none (None: yes); where not, `check_traced` is to follow. around: what the first run is done in.

    Returns `some_of` its outputs. Raises `SecateurError` where the model fails, returns no tensor, or gives other
    outputs for the same inputs.
    """
    with _random_state(model) as drew, without_cache(model), torch.no_grad():
        with around or nullcontext():
            first = _run(model, inputs)
        if not any(tensor.numel() for tensor in first):
            raise SecateurError(
                f"{type(model).__name__} returns no {'values' if first else 'tensor'} on them",
                where="inputs",
                fix="give inputs on which it returns some (for a detector, a lower score threshold)"
                if first
                else "wrap it so that it returns what it computes",
            )
        more = SEEDS - 1 if drew() else int(again is None or again())
        for seed in range(1, 1 + more if steady else 1):
            torch.manual_seed(seed)
            if (why := _apart(first, _run(model, inputs))) is not None:
                raise SecateurError(
                    f"{type(model).__name__} gives other outputs for the same inputs: {why}",
                    where="model",
                    fix="fix its random numbers and its state, or cut it without a proof (prove=False, --prove off)",
                )
        return some_of(first)


def check_traced(model: nn.Module, graph: Graph, inputs: Inputs, first: list[Tensor]) -> None:
    """`check_forward` gave `first` of one run, the trace is the second; where they differ others decide."""
    run = graph._runs.get(str(describe(inputs)))
    if run is None or run.finite is None or _apart(first, run.some) is not None:
        check_forward(model, inputs)


class Buffers:
    """The buffers and attributes of a model as they are now: running it may change them (counters, tables for a
    picture's size), `restore` undoes it."""

    def __init__(self, model: nn.Module):
        self.saved = [
            (module._buffers, name, tensor, tensor.clone())
            for module in model.modules()
            for name, tensor in module._buffers.items()
            if tensor is not None
        ]
        self.attributes = attributes_of(model.modules())

    def changed(self) -> bool:
        """Whether anything is another now, but for what is inside of lists and the like."""
        for now, then in self.attributes:
            if any(key != "training" and now.get(key, now) is not value for key, value in then.items()):
                return True
            if len(now) != len(then):
                return True
        return any(
            owner.get(name) is not tensor or not _same(tensor, value)
            for owner, name, tensor, value in self.saved
        )

    def restore(self) -> None:
        put_back(self.attributes)
        with torch.no_grad():
            for owner, name, tensor, value in self.saved:
                if tensor.shape == value.shape:
                    tensor.copy_(value)
                owner[name] = tensor


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.nan_to_num(), b.nan_to_num())


@contextmanager
def _random_state(model: nn.Module) -> Iterator:
    """Gives whether random numbers were drawn since; all generators are put back at the end."""
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(0)
        states = [torch.get_rng_state(), *(torch.cuda.get_rng_state(d) for d in devices)]

        def drew() -> bool:
            now = [torch.get_rng_state(), *(torch.cuda.get_rng_state(d) for d in devices)]
            return not all(torch.equal(a, b) for a, b in zip(states, now))

        yield drew


def _run(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    try:
        outputs = call(model, inputs)
    except (SecateurError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # the model is the user's: it can fail in any way
        told = " ".join(str(error).split())[:200]
        raise SecateurError(
            f"{type(model).__name__} fails on them ({type(error).__name__}: {told})",
            where="inputs",
            fix="pass what its forward takes: a tensor, a tuple or a dict of keywords",
        ) from error
    return list(flat_tensors(outputs))


def _apart(first: list[Tensor], again: list[Tensor]) -> str | None:
    shapes = [[tuple(t.shape) for t in outputs] for outputs in (first, again)]
    if shapes[0] != shapes[1]:
        return f"shapes {shapes[0]}, then {shapes[1]}"
    for a, b in zip(first, again):
        if not a.numel():
            continue
        if not a.is_floating_point():
            if (share := float((a != b).float().mean())) > 0.01:
                return f"{share:.0%} of its whole numbers differ"
            continue
        gap = (a - b).abs().nan_to_num().max()
        if gap > 1e-2 * a.abs().nan_to_num().max():
            return f"they differ by {float(gap):.2g}"
    return None


def check_tensors(
    model: nn.Module, tensors: Mapping[str, Tensor], what: str, *, where: str, fix: str, new: bool = False
) -> dict[str, nn.Parameter]:
    """The model's parameters by name, once these tensors (`what`, such as "mask") are seen to be of their shapes.

    new: whether a name that the model lacks is fine. Raises `SecateurError` otherwise; nothing is changed.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, tensor in tensors.items():
        own = parameters.get(name)
        if (own is None and not new) or (own is not None and own.shape != tensor.shape):
            has = "no such tensor" if own is None else list(own.shape)
            raise SecateurError(
                f"there is a {what} of {list(tensor.shape)} for {name}, the model has {has}",
                where=where,
                fix=fix,
            )
    return parameters


def check_model(model: nn.Module) -> None:
    """Refuse what isn't a module, has no parameters, or holds weights that aren't in memory or not finite."""
    if not isinstance(model, nn.Module):
        raise SecateurError(
            f"got a {type(model).__name__}",
            where="model",
            fix="pass a torch.nn.Module (the command line takes names)",
        )
    count = 0
    for name, parameter in model.named_parameters():
        count += parameter.numel()
        if parameter.is_meta:
            raise SecateurError(
                "its weights aren't in memory (a device_map that offloads to cpu or disk, or the meta device)",
                where=name,
                fix="load it with a device_map of devices that hold all of it, or prune its folder block by block: prune_folder, --stream",
            )
        if parameter.is_floating_point() and not _finite(parameter.detach()):
            raise SecateurError(
                "its weights hold NaN or infinite values", where=name, fix="load or train the model again"
            )
    if not count:
        raise SecateurError(
            "it has no parameters", where=type(model).__name__, fix="pass a model with weights"
        )


def _finite(tensor: Tensor) -> bool:
    """A sum is finite only where all entries are, and quicker; it may overflow where they are."""
    return bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(tensor).all())
