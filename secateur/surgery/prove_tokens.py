"""The proof that a model with fewer tokens is the dense one on the tokens that stay."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from secateur.graph.groups import Graph
from secateur.surgery.cut import cut_modules
from secateur.utils.inputs import Inputs, map_ids
from secateur.utils.running import call, evaluating, flat_tensors, without_cache


def prove_tokens(model: nn.Module, graph: Graph, name: str, kept: Tensor, inputs: Inputs) -> str | None:
    """Why a model whose vocabulary is cut isn't the dense one on the tokens that stay; None where it is.

    Both read the same kept tokens, the cut one by their new numbers. What they give must be equal within rounding: the
    logits of the kept tokens, and everything else.
    """
    size, kept = graph[name].size, kept.sort().values
    places = map_ids(
        inputs, lambda ids: torch.arange(ids.numel(), device=ids.device).reshape(ids.shape) * 7 % len(kept)
    )
    with evaluating(model), without_cache(model), torch.no_grad():
        old = map_ids(places, lambda ids: kept.to(ids.device)[ids])
        wanted = list(flat_tensors(call(model, old)))
        cut = copy.deepcopy(model)
        cut_modules(cut, graph, {name: kept})
        got = list(flat_tensors(call(cut, places)))
    for a, b in zip(got, wanted, strict=True):
        if b.dim() and b.shape[-1] == size:
            b = b.index_select(-1, kept.to(b.device))
        if a.shape != b.shape:
            return f"an output is {list(a.shape)} where {list(b.shape)} was expected"
        gap = float((a.double() - b.double()).abs().max()) if a.numel() else 0.0
        if not gap <= 1e-4 * max(1.0, float(b.double().abs().max())):
            return f"outputs on kept tokens differ by {gap:.2g}"
    return None
