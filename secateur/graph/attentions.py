"""The attention of blocks as units: whole modules whose part in the residual stream can be left out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from secateur.graph.groups import Graph, Group
from secateur.utils.running import call, evaluating, without_cache

HEADS = ("heads", "kv_groups", "head_dim")
CACHES = "its blocks keep caches of different kinds, which are numbered as the blocks are"


@torch.no_grad()
def attention_groups(model: nn.Module, graph: Graph, inputs: Any) -> list[Group]:
    """Groups of kind `attentions`, one for each list of blocks that add to a residual stream.

    >>> group = attention_groups(model, graph, {"input_ids": ids})[0]  # doctest: +SKIP
    >>> group.name, group.size, group.modules[0]  # doctest: +SKIP
    ('model.layers:attentions', 30, 'model.layers.0.self_attn')

    A unit is the module that holds the heads of a block, seen by their group, where the model calls it once, and it gives a
    tensor of the shape of its input, alone or first in a tuple. The block's norm before it stays. They aren't part of
    `trace`, since heads are finer units of the same weights.
    """
    found: list[Group] = []
    for blocks in [group for group in graph.groups if group.kind == "layers"]:
        path = blocks.name.rpartition(":")[0]
        owners: dict[str, list[str]] = {}
        for heads in [group for group in graph.groups if group.kind in HEADS]:
            module = heads.name.partition(":")[0]
            block = next((b for b in blocks.modules if module.startswith(f"{b}.")), None)
            if block is not None:
                owners.setdefault(block, []).append(module)
        single = {block: modules[0] for block, modules in owners.items() if len(set(modules)) == 1}
        calls = _calls(model, inputs, list(single.values()))
        known = {module: calls[module] for module in single.values() if calls.get(module) is not None}
        kinds = set(known.values())
        if not known or len(kinds) != 1:
            continue
        reason = CACHES if _caches_differ(model) else "a single unit" if len(known) == 1 else None
        found.append(
            Group(
                f"{path}:attentions",
                "attentions",
                len(known),
                reason=reason,
                modules=tuple(known),
                least=0,
                returns=kinds.pop() or 0,
            )
        )
    return found


def _calls(model: nn.Module, inputs: Any, paths: list[str]) -> Mapping[str, int | None]:
    """What each module gave in its only call: 0 a tensor, n a tuple of n; None for anything else."""
    seen: dict[str, list[int | None]] = {path: [] for path in paths}

    def watch(path: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            given = args[0] if args else kwargs.get("hidden_states")
            made = output[0] if isinstance(output, tuple) and output else output
            fits = isinstance(given, Tensor) and isinstance(made, Tensor) and given.shape == made.shape
            seen[path].append((len(output) if isinstance(output, tuple) else 0) if fits else None)

        return hook

    handles = [
        model.get_submodule(path).register_forward_hook(watch(path), with_kwargs=True) for path in paths
    ]
    try:
        with evaluating(model), without_cache(model):
            call(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return {path: found[0] if len(found) == 1 else None for path, found in seen.items()}


def _caches_differ(model: nn.Module) -> bool:
    config: Any = getattr(model, "config", None)
    config = getattr(config, "get_text_config", lambda: config)()
    return len(set(getattr(config, "layer_types", None) or ())) > 1
