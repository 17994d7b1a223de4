"""What a row holds beside its figures, for the page of a run: what each layer keeps, scores, a map, kept tokens."""

from __future__ import annotations

import base64
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import SecateurError
from secateur.pruning.plan import Plan
from secateur.pruning.prune import Pruned
from secateur.saliency import saliency
from secateur.tasks.scenes.draw import encode
from secateur.tasks.scenes.evaluate import picture
from secateur.tasks.scenes.models import inputs
from secateur.tokens.attach import attach

BINS = 24
PICTURE = 3
"""The test picture of `scenes` on which the kept tokens are shown."""


def layers(plan: Plan) -> list[list[Any]]:
    """[group or tensor, how much stays, of how much]"""
    units = [[name, len(kept), plan.sizes[name]] for name, kept in plan.keep.items()]
    return [*units, *([name, int(mask.sum()), mask.numel()] for name, mask in plan.masks.items())]


def histogram(done: Pruned) -> dict[str, Any] | None:
    """How many units stay and leave by their score, in 24 bins; None where a method shows no scores."""
    groups = {name: scores for name, scores in done.scores.items() if scores.isfinite().any()}
    if not groups:
        return None
    values = torch.cat([scores.double().flatten() for scores in groups.values()])
    kept = torch.cat([_kept(done.plan, name, scores) for name, scores in groups.items()])
    real = values.isfinite()
    low, high = values[real].min().item(), values[real].max().item()
    counts = {
        key: torch.histc(values[real & which], BINS, low, high).long().tolist()
        for key, which in (("kept", kept), ("cut", ~kept))
    }
    return {"low": low, "high": high, **counts}


def _kept(plan: Plan, name: str, scores: Tensor) -> Tensor:
    if name not in plan.keep:
        return torch.ones(scores.numel(), dtype=torch.bool)
    return torch.zeros(scores.numel(), dtype=torch.bool).index_fill(0, plan.keep[name], True)


def gradient_map(model: nn.Module, train: Any, inputs: Any) -> dict[str, Any] | None:
    """How much the pruned network's first answer hangs on each pixel of the first training picture; None where the network's
    inputs aren't pictures alone."""
    if not (isinstance(inputs, Tensor) and isinstance(train, tuple) and train[0].ndim == 4):
        return None
    try:
        values = saliency(model, train[0][0], method="gradient").values.abs()
    except SecateurError:  # no classes, so no map
        return None
    return as_bytes(values / values.max().clamp_min(1e-12))


@torch.no_grad()
def kept_tokens(model: nn.Module, method: str, **settings: Any) -> dict[str, list[int]]:
    """The visual tokens of the shown picture that each stage kept."""
    image, questions = picture(PICTURE)
    question = next(iter(questions.values()))[0]
    with attach(model, method, **settings) as attached:
        model(**inputs(model, image[None], [encode(question)]))
        return {str(stage): rows[0].tolist() for stage, rows in attached.kept.items()}


def as_bytes(values: Tensor) -> dict[str, Any]:
    """[rows, columns] in 0..1 as bytes in base64."""
    levels = (values.float().clamp(0, 1) * 255).round().to(torch.uint8).cpu()
    return {"shape": list(levels.shape), "bytes": base64.b64encode(levels.numpy().tobytes()).decode()}


def shown_picture() -> Tensor:
    """uint8 [3, 64, 64]"""
    return picture(PICTURE)[0]
