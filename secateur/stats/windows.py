"""Short calibration windows drawn from longer data, and how far two models' predictions are apart on them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import SecateurError
from secateur.graph import Graph
from secateur.surgery import mask_units
from secateur.utils.batches import as_batches
from secateur.utils.running import evaluating, logits_of, run

TEXTS = ("input_ids", "attention_mask", "labels", "position_ids", "token_type_ids")


def draw_windows(data: Any, count: int, length: int, generator: torch.Generator) -> Any:
    """`count` calibration inputs drawn without repeats, text cut to a random window of `length` tokens.

    >>> draw_windows(torch.arange(40).reshape(4, 10), 3, 5, torch.Generator()).shape
    torch.Size([3, 5])

    data: token ids [samples, tokens], or a list of model inputs: of dicts with `input_ids` the text is cut, all others
    stay whole. Where there are fewer rows than asked for, long ones are parted into several windows; what is short
    stays short. Raises `SecateurError` when there is nothing to draw from.
    """
    if data is None or len(data) == 0:
        raise SecateurError("there is nothing to draw from", where="calibration data", fix="pass data=")
    if isinstance(data, Tensor) and data.dim() == 2 and not data.is_floating_point():
        if len(data) < count and (parts := data.shape[1] // length) > 1:
            data = data[:, : parts * length].reshape(-1, length)
        rows = torch.randperm(len(data), generator=generator)[:count].tolist()
        return torch.stack([data[row, _window(data.shape[1], length, generator)] for row in rows])
    if isinstance(data, Tensor):
        return data[torch.randperm(len(data), generator=generator)[:count].to(data.device)]
    items = [data] if isinstance(data, tuple) or hasattr(data, "keys") else list(data)
    order = torch.randperm(len(items), generator=generator)[:count].tolist()
    return [_cut(items[index], length, generator) for index in order]


def _window(total: int, length: int, generator: torch.Generator) -> slice:
    start = int(torch.randint(max(1, total - length + 1), (1,), generator=generator))
    return slice(start, start + length)


def _cut(item: Any, length: int, generator: torch.Generator) -> Any:
    if not hasattr(item, "keys") or not isinstance(item.get("input_ids"), Tensor):
        return item
    shape = item["input_ids"].shape
    if len(item) > sum(name in item for name in TEXTS):
        return item
    window = _window(shape[-1], length, generator)
    return {name: value[..., window] if value.shape == shape else value for name, value in item.items()}


@torch.no_grad()
def kl_divergence(dense: nn.Module, pruned: nn.Module, data: Any, floor: float = 1e-12) -> float:
    """Mean over tokens of Σ_v p (log p - log q), p of `dense`, q of `pruned`, float32, probabilities at least `floor`.

    data: token ids [samples, length] or a list of model inputs.
    """
    total, count = 0.0, 0
    with evaluating(dense), evaluating(pruned):
        for batch in as_batches(data):
            p, q = (
                logits_of(run(model, batch)).float().softmax(-1).clamp_min(floor) for model in (dense, pruned)
            )
            total += float((p * (p.log() - q.log())).sum())
            count += p[..., 0].numel()
    return total / count


def masked_divergence(model: nn.Module, graph: Graph, keep: Mapping[str, Tensor], data: Any) -> float:
    """`kl_divergence` between a model and itself with only the kept units of every group.

    >>> masked_divergence(model, graph, {"model.layers.0.mlp:neurons": kept}, ids)  # doctest: +SKIP
    """
    pruned = copy.deepcopy(model)
    mask_units(pruned, graph, keep)
    return kl_divergence(model, pruned, data)
