"""How well several masks of one picture meet several true ones, and how well scores follow people's.

The measures of pluralistic salient objects, Feng et al. 2024, https://arxiv.org/abs/2409.02368.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from scipy.stats import pearsonr, spearmanr
from torch import Tensor

from secateur.errors import SecateurError

LEVELS = range(10, 20)
"""Thresholds of intersection over union in twentieths: 0.50, 0.55, ..., 0.95; whole numbers, so that none is rounded."""


def overlaps(predictions: Tensor, truths: Tensor) -> tuple[Tensor, Tensor]:
    """(intersections, unions) in pixels, int64 [P, G], of masks bool [P, ...] and [G, ...].

    >>> a, b = torch.tensor([[1, 1, 0]]).bool(), torch.tensor([[0, 1, 1], [1, 1, 0]]).bool()
    >>> [t.tolist() for t in overlaps(a, b)]
    [[[1, 2]], [[3, 2]]]
    """
    for name, given in (("predictions", predictions), ("truths", truths)):
        if given.is_floating_point():
            raise SecateurError("the masks are of floats", where=name, fix="give bool: mask >= 0.5")
    if predictions.shape[1:] != truths.shape[1:]:
        raise SecateurError(
            f"masks of {tuple(predictions.shape[1:])} and of {tuple(truths.shape[1:])}",
            where="overlaps",
            fix="bring them to one size",
        )
    p, g = (m.flatten(1).bool().double() for m in (predictions, truths))
    inside = (p @ g.T).round().long()
    return inside, p.sum(1).long()[:, None] + g.sum(1).long() - inside


def iou(predictions: Tensor, truths: Tensor) -> Tensor:
    """Intersection over union, float64 [P, G]; of two empty masks 1."""
    inside, union = overlaps(predictions, truths)
    return torch.where(union > 0, inside / union.clamp(min=1).double(), 1.0)


def opinion_figures(predictions: Sequence[Tensor], truths: Sequence[Tensor]) -> dict[str, float]:
    """`precision`, `recall` and `f1`, means over pictures of means over the thresholds 0.50 to 0.95, and `soft_...` without any.

    >>> one = torch.tensor([[[1, 1, 0]]]).bool()
    >>> opinion_figures([one], [one])["f1"]
    1.0

    predictions: of each picture masks bool [P, ...], P may be 0, which has no precision and no recall. truths: masks [G, ...],
    none empty. Precision: the share of masks that meet any truth; recall: of truths that any mask meets; one mask may meet
    several truths. Raises `SecateurError`: no picture, another number of them, floats, another size, a truth without an object.
    """
    if not truths or len(predictions) != len(truths):
        raise SecateurError(
            f"{len(predictions)} predictions for {len(truths)} truths",
            where="opinions",
            fix="give masks of each picture",
        )
    rows = []
    for number, (own, true) in enumerate(zip(predictions, truths)):
        if not len(true) or not true.flatten(1).any(1).all():
            raise SecateurError(
                "a truth shows no object", where=f"picture {number}", fix="leave out empty masks"
            )
        if not len(own):
            rows.append((0.0, 0.0, 0.0, 0.0))
            continue
        inside, union = overlaps(own, true)
        met = torch.stack([20 * inside >= level * union for level in LEVELS]).double()
        best = iou(own, true)
        rows.append(
            (
                met.amax(2).mean().item(),
                met.amax(1).mean().item(),
                best.amax(1).mean().item(),
                best.amax(0).mean().item(),
            )
        )
    precision, recall, soft_precision, soft_recall = (float(v) for v in np.mean(rows, 0))
    return {
        "precision": precision,
        "recall": recall,
        "f1": _f1(precision, recall),
        "soft_precision": soft_precision,
        "soft_recall": soft_recall,
        "soft_f1": _f1(soft_precision, soft_recall),
    }


def preference_figures(predicted: Sequence[float], people: Sequence[float]) -> dict[str, float]:
    """Pearson's and Spearman's correlation and the mean absolute error of scores against people's.

    >>> found = preference_figures([0.9, 0.4, 0.7, 0.2], [1, 0.3, 0.5, 0.4])
    >>> {name: round(value, 6) for name, value in found.items()}
    {'pearson': 0.827586, 'spearman': 0.8, 'mae': 0.15}

    Raises `SecateurError`: fewer than two scores, another number of them, and scores of people that are all alike. Predicted
    ones that are all alike follow nothing: 0.
    """
    a, b = np.asarray(predicted, float), np.asarray(people, float)
    if a.shape != b.shape or a.ndim != 1 or len(a) < 2:
        raise SecateurError(
            f"{a.size} scores for {b.size}", where="preferences", fix="give two or more of each"
        )
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise SecateurError("a score isn't finite", where="preferences", fix="give numbers")
    if (b == b[0]).all():
        raise SecateurError(
            f"people's scores are all {b[0]:g}", where="preferences", fix="give masks of different worth"
        )
    alike = bool((a == a[0]).all())
    return {
        "pearson": 0.0 if alike else float(pearsonr(a, b).statistic),
        "spearman": 0.0 if alike else float(spearmanr(a, b).statistic),
        "mae": float(np.abs(a - b).mean()),
    }


def _f1(precision: float, recall: float) -> float:
    total = precision + recall
    return 2 * precision * recall / total if total and math.isfinite(total) else 0.0
