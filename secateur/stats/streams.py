"""A residual stream as its norms see it: which norm each layer reads, and the second moments of what the norms are given."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from secateur.utils.batches import as_batches, token_mask
from secateur.utils.inputs import Inputs
from secateur.utils.running import call, evaluating, run, without_cache


@torch.no_grad()
def norms_read(
    model: nn.Module, inputs: Inputs, norms: Sequence[str], readers: Sequence[str]
) -> dict[str, str | None]:
    """Reader -> the norm whose output it was given, both by module path; None for anything else.

    >>> norms_read(llama, {"input_ids": ids}, norms, ["model.layers.0.mlp.up_proj"])  # doctest: +SKIP
    {'model.layers.0.mlp.up_proj': 'model.layers.0.post_attention_layernorm'}

    A view of the norm's output counts as that output: one run is watched, and all that the norms gave is kept meanwhile.
    """
    made: dict[int, str] = {}
    alive: list[Tensor] = []
    found: dict[str, str | None] = {}

    def left(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            alive.append(output)
            made[output.untyped_storage().data_ptr()] = path

        return hook

    def entered(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            given = next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)), None)
            norm = None if given is None else made.get(given.untyped_storage().data_ptr())
            found[path] = norm if found.get(path, norm) == norm else None

        return hook

    handles = [model.get_submodule(path).register_forward_hook(left(path)) for path in norms]
    handles += [
        model.get_submodule(path).register_forward_pre_hook(entered(path), with_kwargs=True)
        for path in readers
    ]
    try:
        with evaluating(model), without_cache(model):
            call(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return {path: found.get(path) for path in readers}


@torch.no_grad()
def second_moments(
    model: nn.Module,
    data: Any,
    norms: Sequence[str],
    normalised: bool = True,
    progress: Callable[..., Iterable] | None = None,
) -> dict[str, Tensor]:
    """[width, width], float64, for each norm: the mean over tokens of x xᵀ of what it is given.

    >>> second_moments(llama, ids, ["model.norm"])["model.norm"].trace()  # doctest: +SKIP
    tensor(576.)

    normalised: each token is divided by its root mean square first, as a norm would. Padding doesn't count.
    """
    totals: dict[str, Tensor] = {}
    counts: dict[str, int] = dict.fromkeys(norms, 0)
    mask: Tensor | None = None

    def watch(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].detach().float()
            x = x[mask.to(x.device)] if mask is not None and mask.shape == x.shape[:-1] else x.flatten(0, -2)
            if normalised:
                x = x / x.square().mean(-1, keepdim=True).sqrt().clamp_min(torch.finfo(x.dtype).tiny)
            totals[path] = totals.get(path, 0) + (x.T @ x).double()
            counts[path] += len(x)

        return hook

    handles = [model.get_submodule(path).register_forward_pre_hook(watch(path)) for path in norms]
    batches = as_batches(data)
    try:
        with evaluating(model):
            for batch in progress(batches, "second moments", len(batches)) if progress else batches:
                mask = token_mask(batch)
                run(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return {path: total / counts[path] for path, total in totals.items()}
