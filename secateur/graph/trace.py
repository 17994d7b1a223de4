"""Run a model once and follow every prunable index of every parameter through it.

`trace` runs the model's own forward on the given inputs and watches each operation: high-level ones (linear, matmul,
einsum, attention, recurrent layers) where Python calls them, all others where PyTorch dispatches them. No graph is
exported, so caches and nested outputs need nothing special. A run sees the branches that its inputs take: parameters
that no run reached are named.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from secateur.errors import SecateurError
from secateur.graph.build import build_graph
from secateur.graph.groups import Graph
from secateur.graph.labels import Axes
from secateur.graph.run import run_model
from secateur.graph.sparing import Looked, worthwhile
from secateur.graph.tracer import Tracer
from secateur.utils.running import module_paths


def trace(
    model: nn.Module,
    inputs: Any,
    *,
    also: Sequence[Any] = (),
    inner: bool = False,
    values: bool = False,
    vocabulary: bool = False,
) -> Graph:
    """The groups of coupled parameter slices of a model.

    >>> graph = trace(model, {"input_ids": torch.zeros(2, 8, dtype=torch.long)})
    >>> print(graph.explain())
    >>> graph["model.layers.0.mlp:neurons"].size
    24

    The model is run in evaluation mode and without gradients, and is left as it was; once more with the modules that
    hold parameters out of reach in train mode, if there are any. Spec: spa (arXiv 2403.18955), algorithm A.

    Args:
        model: any module; nothing of it need be exportable.
        inputs: a tensor, a tuple of positional arguments or a dict of keyword arguments of `model.forward`. Use a batch
            of two or more: an axis of size one is never taken for a prunable one, but its merges with other axes are
            ambiguous.
        also: further inputs, of the same forms, that take the branches which `inputs` doesn't. Costs are those of
            `inputs`.
        inner: the units of attention are entries of its heads' width (kind `head_dim`: the same entry of every head, of
            queries and keys with the partner it is rotated with) instead of whole heads. A tensor can be cut along one
            of them.
        values: compute everything, and note a little of the outputs, which the checks of `prune` compare. Without it
            convolutions are left out as long as nothing that runs can tell: no branch, size or index hangs on them.

        vocabulary: the tokens that a language model reads and writes are units too (kind `vocabulary`). What leaves with
            one changes what ids mean and the shape of the logits; without it they are frozen for that reason.

    Returns:
        The graph; groups that can't be cut are in it with the reason, and parameters that no run reached are named in
        `graph.unreached`.

    Raises:
        SecateurError: the model cannot be run on the inputs.
    """
    spare = not values and worthwhile([module for _, module in module_paths(model)])
    tracer, outputs = _ran(model, [inputs, *also], inner, spare=spare)
    spare = any(run.finite is None for run in tracer.notes.runs)
    runs = {run.inputs: run for run in reversed(tracer.notes.runs)}
    training: list[nn.Module] = []
    if missed := tracer.unreached():
        tracer, outputs, training = _in_training(model, [inputs, *also], inner, missed, tracer, outputs)
    graph = build_graph(tracer, outputs, vocabulary)
    stuck = collapsed(tracer, graph)
    if stuck:  # grouped convolutions that cannot lose the same channel of every group: let whole groups leave
        tracer, outputs = _ran(model, [inputs, *also], inner, stuck, training, spare)
        graph = build_graph(tracer, outputs, vocabulary)
    graph._runs = runs
    return graph


def _ran(
    model: nn.Module,
    inputs: Sequence[Any],
    inner: bool,
    whole_groups: frozenset[str] = frozenset(),
    training: Sequence[nn.Module] = (),
    spare: bool = False,
) -> tuple[Tracer, list[Axes]]:
    """A tracer that saw a run on each of these inputs, then one with `training` in train mode; all outputs.

    With `spare` convolutions are not computed, as long as nothing looks at what they give.
    """
    for spared in (True, False) if spare else (False,):
        tracer = Tracer(model, whole_groups, inner)
        try:
            outputs = [axes for each in inputs for axes in run_model(tracer, each, spare=spared)]
            break
        except Looked:
            continue
    if training:
        # Norms and dropout stay in eval mode, but a module of the model's own may count or draw as it trains.
        buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
        devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
        try:
            with torch.random.fork_rng(devices=devices):
                outputs += run_model(tracer, inputs[0], training)
        finally:
            for buffer, before in buffers:
                buffer.data.copy_(before)
    return tracer, outputs


def _in_training(
    model: nn.Module,
    inputs: Sequence[Any],
    inner: bool,
    missed: Sequence[str],
    tracer: Tracer,
    outputs: list[Axes],
) -> tuple[Tracer, list[Axes], list[nn.Module]]:
    """What a run in train mode adds, if it reaches more; else what there was."""
    above = {".".join(name.split(".")[:n]) for name in missed for n in range(name.count(".") + 1)}
    still = (nn.modules.batchnorm._NormBase, nn.modules.dropout._DropoutNd)
    training = [m for path, m in tracer.unique() if path in above and not isinstance(m, still)]
    try:
        trained, found = _ran(model, inputs, inner, frozenset(), training)
    except SecateurError:  # a model that doesn't train on these inputs, as without its labels
        return tracer, outputs, []
    if len(trained.unreached()) < len(missed):
        return trained, found, training
    return tracer, outputs, []


def collapsed(tracer: Tracer, graph: Graph) -> frozenset[str]:
    """Grouped convolutions whose channels have all become one unit."""
    single = np.zeros(len(graph._open), bool)
    for group in graph.groups:
        if group.reason == "a single unit":
            single[group._classes] = True
    return frozenset(path for path, ids in tracer.notes.grouped.items() if single[graph._class[ids]].any())
