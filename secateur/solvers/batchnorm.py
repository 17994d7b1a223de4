"""BatchNorm statistics after a cut."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import SecateurError
from secateur.graph import Graph
from secateur.surgery import mask_units
from secateur.surgery.changes import set_values
from secateur.utils.batches import inputs_of
from secateur.utils.inputs import map_tensors
from secateur.utils.running import call, device_of, evaluating


@torch.no_grad()
def reestimate_batchnorm(model: nn.Module, batches: Iterable[Any]) -> int:
    """Means and variances of every BatchNorm anew, as the plain average over the batches. Gives how many layers.

    >>> reestimate_batchnorm(pruned.model, [images[:64], images[64:]])  # doctest: +SKIP

    All else stays in eval mode: dropout is off. Raises `SecateurError` where there are no batches.
    """
    norms = [
        m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats
    ]
    momenta = [norm.momentum for norm in norms]
    before = {norm: {name: b.clone() for name, b in norm.named_buffers()} for norm in norms}
    count = 0
    try:
        with evaluating(model):
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None
                norm.train()
            for batch in batches if norms else ():
                call(model, map_tensors(batch, lambda tensor: tensor.to(device_of(model))))
                count += 1
    finally:
        for norm, momentum in zip(norms, momenta):
            norm.momentum = momentum
            if not count:
                for name, buffer in norm.named_buffers():
                    buffer.copy_(before[norm][name])
    if norms and not count:
        raise SecateurError("there are no batches", where="reestimate_batchnorm", fix="pass model inputs")
    return len(norms)


def batchnorm_after(
    model: nn.Module,
    graph: Graph,
    keep: Mapping[str, Tensor],
    values: Mapping[str, Tensor],
    batches: list[Any],
    how: str,
) -> dict[str, Tensor]:
    """Means and variances of every BatchNorm after the cut, at their dense shape; zeros for channels that leave.

    how: "new", as they are on `batches`; "shift", what the model has, moved by the difference (means) and the ratio
    (variances) between the pruned and the dense model on `batches`: few batches then add little noise.
    """
    dense, model = (copy.deepcopy(model) for _ in range(2))
    own = batchnorm_statistics(dense)
    if not own:
        return {}
    set_values(model, values)
    mask_units(model, graph, keep)
    inputs = [inputs_of(model, batch) for batch in batches]
    reestimate_batchnorm(model, inputs)
    after = batchnorm_statistics(model)
    if how == "new":
        return after
    reestimate_batchnorm(dense, inputs)
    before = batchnorm_statistics(dense)
    return {
        name: own[name] * after[name] / before[name].clamp_min(1e-12)
        if name.endswith("var")
        else own[name] + after[name] - before[name]
        for name in own
    }


def batchnorm_statistics(model: nn.Module) -> dict[str, Tensor]:
    """Copies of `running_mean` and `running_var` by buffer name."""
    buffers = dict(model.named_buffers())
    return {
        name: buffers[name].detach().float().clone()
        for path, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats
        for name in (f"{path}.running_mean".lstrip("."), f"{path}.running_var".lstrip("."))
    }
