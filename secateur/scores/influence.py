"""How much each block changes what passes through it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import SecateurError
from secateur.utils.batches import as_batches, token_mask
from secateur.utils.running import evaluating, run


def cosine_change(x: Tensor, y: Tensor) -> Tensor:
    """1 - cos(x_t, y_t) of every vector: [..., d], [..., d] -> [...], float32.

    >>> cosine_change(torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 1.0]]))
    tensor([0.2929])
    """
    return 1 - nn.functional.cosine_similarity(x.float(), y.float(), dim=-1)


@torch.no_grad()
def block_influence(
    model: nn.Module,
    data: Any,
    paths: Sequence[str],
    progress: Callable[..., Iterable] | None = None,
    play: Callable[[int], None] | None = None,
) -> Tensor:
    """[blocks]: mean over tokens of 1 - cos(input, output) of each block; float64, in the order of `paths`.

    data: token ids [samples, length] or a list of model inputs; padding (`attention_mask` 0) doesn't count.
    play: runs these blocks on a batch, by its number; None: the model runs.
    Raises `SecateurError` when a block doesn't give back hidden states of the shape it was given, or isn't run.
    """
    totals, counts = (
        torch.zeros(len(paths), dtype=torch.float64),
        torch.zeros(len(paths), dtype=torch.float64),
    )
    mask: Tensor | None = None

    def hook(index: int) -> Callable[..., None]:
        def record(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
            x = args[0] if args else kwargs.get("hidden_states")
            y = output[0] if isinstance(output, tuple | list) else output
            if not isinstance(x, Tensor) or not isinstance(y, Tensor) or x.shape != y.shape:
                raise SecateurError("its output isn't shaped like its input", where=paths[index])
            change = cosine_change(x, y)
            weight = torch.ones_like(change)
            if mask is not None and mask.shape == change.shape:
                weight = mask.to(change)
            totals[index] += float((change * weight).double().sum())
            counts[index] += float(weight.double().sum())

        return record

    handles = []
    try:
        for index, path in enumerate(paths):
            handles.append(model.get_submodule(path).register_forward_hook(hook(index), with_kwargs=True))
        items = as_batches(data)
        with evaluating(model):
            every = progress(items, "block influence", len(items)) if progress else items
            for number, batch in enumerate(every):
                mask = token_mask(batch)
                play(number) if play else run(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    if (counts == 0).any():
        path = paths[int((counts == 0).nonzero()[0])]
        raise SecateurError("it didn't run on the calibration data", where=path)
    return totals / counts
