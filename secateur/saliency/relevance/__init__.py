"""Layer-wise relevance propagation through any model, by the operations that it runs.

While a model runs under `RelevanceMode`, every operation that the picture passes gets a backward of its own, which
carries relevance where autograd carries gradients. Operations that only move numbers (views, cat, pad, max pooling) keep
their gradient, which moves relevance the same way; residual sums are found where they happen. One forward, one backward.

| operation | rule |
| --- | --- |
| convolution, linear; BatchNorm right behind is folded into it | the composite's |
| sum of two activations | in proportion to them |
| average pooling, mean, sum | in proportion to the inputs |
| max pooling | the winner takes all |
| ReLU and other activations, dropout, other norms, times or plus a constant | as it is |
| attention | its weights are constants, the values get all, in proportion (Ali et al. 2022, arXiv 2202.07304); or half goes through the softmax (Achtibat et al. 2024, arXiv 2402.05602) |
| product with the output of a sigmoid | all to the other factor |
| product of two activations | half each |

Bach et al. 2015, https://doi.org/10.1371/journal.pone.0130140; Montavon et al. 2019, "Layer-Wise Relevance Propagation: An
Overview"; the rule for a box of pixels is that of Montavon et al. 2017, https://arxiv.org/abs/1512.02479.
Spec: lrp-pruning, salient-relevance.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import SecateurError
from secateur.saliency.record import undisturbed
from secateur.saliency.relevance.composite import COMPOSITES, RULES, Composite, as_composite
from secateur.saliency.relevance.mode import RelevanceMode, check_rules, plain
from secateur.saliency.relevance.rules import layer_relevance

__all__ = [
    "COMPOSITES",
    "RULES",
    "Composite",
    "RelevanceMode",
    "as_composite",
    "check_rules",
    "in_float32",
    "layer_relevance",
    "plain",
    "propagate",
]


def in_float32(model: nn.Module) -> nn.Module:
    """The model, or, where it is in half precision, a float32 copy."""
    if any(p.dtype in (torch.float16, torch.bfloat16) for p in model.parameters()):
        return copy.deepcopy(model).float()
    return model


def propagate(
    model: nn.Module,
    inputs: Any,
    start: Callable[[Tensor], Tensor],
    composite: str | Composite = "epsilon-plus-flat",
    *,
    run: Callable[[nn.Module, Any], Tensor] | None = None,
    watch: Callable[[str, Tensor], None] | None = None,
) -> Tensor | None:
    """The relevance of the input, of its shape; None for token ids.

    >>> R = propagate(vgg, x, lambda logits: F.one_hot(logits.argmax(1), 1000) * 1.0)  # doctest: +SKIP
    >>> R.sum((1, 2, 3))  # doctest: +SKIP

    inputs: what the model is called with, a float tensor [N, ...] or anything that `run(model, inputs)` takes.
    start: logits -> the relevance they begin with, of their shape.
    watch: called with the name of a weight (as in `named_parameters`) and the relevance at its layer's output (behind a
        folded BatchNorm), [..., channels], each time that it was used.

    Half precision runs in a float32 copy. Raises `SecateurError` where an operation has no rule, or nothing arrives.
    """
    model = in_float32(model)
    names = {id(p): name for name, p in model.named_parameters(remove_duplicate=False)}
    mode = RelevanceMode(as_composite(composite), names, watch)
    with undisturbed(model):
        if isinstance(inputs, Tensor) and inputs.is_floating_point():
            first = next(model.parameters(), inputs)
            inputs = inputs.detach().to(first.device, first.dtype).clone().requires_grad_(True)
        x = inputs
        if isinstance(inputs, Tensor) and inputs.requires_grad:
            x = inputs.view_as(inputs)
            x._pixels = True  # type: ignore[attr-defined]
        with mode:
            logits = run(model, x) if run else model(x)
        if not isinstance(logits, Tensor):
            from secateur.utils.running import logits_of

            logits = logits_of(logits)
        if not logits.requires_grad:
            raise SecateurError(
                "no relevance can leave the output",
                where=type(model).__name__,
                fix="give a model that ends in logits, before any softmax",
            )
        check_rules(logits, model)
        relevance = start(logits.detach()).to(logits)
        given = [inputs] if isinstance(inputs, Tensor) and inputs.requires_grad else mode.leaves
        with torch.no_grad():
            found = torch.autograd.grad(logits, given, relevance, allow_unused=True)
    if all(part is None for part in found):
        raise SecateurError(
            "no relevance arrives at the input",
            where=type(model).__name__,
            fix="it must end in logits, not in a softmax",
        )
    return found[0] if given[0] is inputs else None
