"""How well salient objects are found: the measures of the field, as PySODMetrics computes them.

F-measure: Achanta et al. 2009. S-measure: Fan et al. 2017, https://arxiv.org/abs/1708.00786. E-measure: Fan et al. 2018,
https://arxiv.org/abs/1805.10421. PySODMetrics itself can't be installed beside numpy 2.4, so the numbers are worked out here and held
to its own in the tests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage
from torch import Tensor

from secateur.errors import SecateurError
from secateur.utils.screen import Screen

BETA2 = 0.3
EPS = np.spacing(1)


@dataclass(repr=False)
class SalientFigures(Screen):
    """Means over pictures, and what single pictures have.

    `f_max`, `f_adaptive`, `f_curve` [256]: F-measure with beta^2 = 0.3, its highest over the thresholds, at twice the mean of a map,
    and at each threshold from 255 down to 0. `e_max`, `e_adaptive`: E-measure. `s`: S-measure. `mae`: mean absolute error.
    `iou`: of the mask. `components`: pieces of the mask, by eight neighbours. `each`: mae, s, iou and components by picture.
    """

    f_max: float
    f_adaptive: float
    f_curve: np.ndarray
    e_max: float
    e_adaptive: float
    s: float
    mae: float
    iou: float
    components: float
    each: dict[str, list[float]]

    def table(self) -> dict[str, float]:
        """The means by name."""
        return {name: value for name, value in vars(self).items() if isinstance(value, float)}


def salient_figures(
    maps: Sequence[Tensor], truths: Sequence[Tensor], masks: Sequence[Tensor] | None = None
) -> SalientFigures:
    """The figures of saliency maps [H, W] in 0..1 against true masks bool [H, W], of any sizes.

    >>> import torch
    >>> truth = torch.tensor([[1, 1, 0], [0, 0, 0]]).bool()
    >>> found = salient_figures([truth.float()], [truth])
    >>> round(found.f_max, 6), found.mae, found.iou, found.components
    (1.0, 0.0, 1.0, 1.0)

    masks: what each map calls salient, for `iou` and `components`; default: 0.5 or more. As in the field a map is rounded to 8 bits
    and brought to 0..1 before it is judged, but for its mask. Raises `SecateurError`: no prediction, another number or size of
    masks, masks of floats, maps that aren't floats in 0..1.
    """
    if not maps:
        raise SecateurError("there is no prediction", where="maps", fix="give a map of each picture")
    masks = [m >= 0.5 for m in maps] if masks is None else masks
    if not len(maps) == len(truths) == len(masks):
        raise SecateurError(
            f"{len(maps)} maps and {len(masks)} masks for {len(truths)} truths",
            where="maps",
            fix="give one of each picture",
        )
    rows = []
    for number, (one, truth, mask) in enumerate(zip(maps, truths, masks)):
        where = f"picture {number}"
        for name, given in (("truth", truth), ("mask", mask)):
            if given.shape != one.shape or given.dim() != 2:
                raise SecateurError(
                    f"the map is {tuple(one.shape)}, its {name} {tuple(given.shape)}",
                    where=where,
                    fix="enlarge the map to the picture's own size",
                )
            if given.is_floating_point():
                raise SecateurError(f"its {name} is of floats", where=where, fix="give bool: mask >= 0.5")
        if not one.is_floating_point() or not bool(((one >= 0) & (one <= 1)).all()):
            raise SecateurError("the map isn't of floats in 0..1", where=where, fix="give probabilities")
        rows.append(_one(one.double().cpu().numpy(), truth.bool().cpu().numpy(), mask.bool().cpu().numpy()))
    f_curve, e_curve = (np.mean([row[name] for row in rows], 0) for name in ("f_curve", "e_curve"))
    names = ("f_adaptive", "e_adaptive", "s", "mae", "iou", "components")
    mean = {name: float(np.mean([row[name] for row in rows])) for name in names}
    each = {name: [float(row[name]) for row in rows] for name in ("mae", "s", "iou", "components")}
    return SalientFigures(
        f_max=float(f_curve.max()), f_curve=f_curve, e_max=float(e_curve.max()), each=each, **mean
    )


def _one(values: np.ndarray, truth: np.ndarray, mask: np.ndarray) -> dict[str, np.ndarray]:
    x = np.round(values * 255) / 255
    if x.max() > x.min():
        x = (x - x.min()) / (x.max() - x.min())
    level = (x * 255).astype(np.uint8)
    inside, outside = (np.bincount(level[part], minlength=256)[::-1].cumsum() for part in (truth, ~truth))
    top = x >= min(2 * x.mean(), 1)
    at_top = np.array([(top & truth).sum()]), np.array([(top & ~truth).sum()])
    union = (mask | truth).sum()
    return {
        "f_curve": _f(inside, outside, truth),
        "f_adaptive": _f(*at_top, truth)[0],
        "e_curve": _e(inside, outside, truth),
        "e_adaptive": _e(*at_top, truth)[0],
        "s": _s(x, truth),
        "mae": np.abs(x - truth).mean(),
        "iou": (mask & truth).sum() / union if union else np.float64(1),
        "components": ndimage.label(mask, np.ones((3, 3)))[1],
    }


def _f(inside: np.ndarray, outside: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """F-measure where so many pixels of the object and so many others are called salient."""
    precision, recall = inside / np.maximum(inside + outside, 1), inside / max(truth.sum(), 1)
    below = BETA2 * precision + recall
    return (1 + BETA2) * precision * recall / np.where(below > 0, below, 1)


def _e(inside: np.ndarray, outside: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """How well two binary maps agree about their means: each pixel's alignment, one of four values, squared."""
    whole, object_ = truth.size, truth.sum()
    called = inside + outside
    if object_ in (0, whole):
        return (called if object_ else whole - called) / (whole - 1 + EPS)
    total = np.zeros(called.shape)
    for said, true, count in (
        (1, 1, inside),
        (1, 0, outside),
        (0, 1, object_ - inside),
        (0, 0, whole - object_ - outside),
    ):
        a, b = said - called / whole, true - object_ / whole
        total += count * (2 * a * b / (a**2 + b**2 + EPS) + 1) ** 2 / 4
    return total / (whole - 1 + EPS)


def _s(x: np.ndarray, truth: np.ndarray) -> float:
    """Half of how evenly object and background are told apart, half of how alike the quarters around the object's centre are."""
    share = truth.mean()
    if share in (0, 1):
        return float(x.mean() if share else 1 - x.mean())

    def even(values: np.ndarray) -> float:
        spread = values.std(ddof=1) if values.size > 1 else 0.0
        return float(2 * values.mean() / (values.mean() ** 2 + 1 + spread + EPS))

    by_object = share * even(x[truth]) + (1 - share) * even(1 - x[~truth])
    y, z = (int(c) + 1 for c in np.argwhere(truth).mean(0).round())
    by_region = 0.0
    for rows in (slice(0, y), slice(y, None)):
        for columns in (slice(0, z), slice(z, None)):
            by_region += _alike(x[rows, columns], truth[rows, columns]) * x[rows, columns].size / x.size
    return max(0.0, float((by_object + by_region) / 2))


def _alike(x: np.ndarray, truth: np.ndarray) -> float:
    """Likeness of structure of one part: of its means, spreads, and of how both vary together."""
    if not x.size:
        return 0.0
    a, b, n = x.mean(), truth.mean(), max(x.size - 1, 1)
    together = ((x - a) * (truth - b)).sum() / n
    apart = (a**2 + b**2) * (((x - a) ** 2).sum() + ((truth - b) ** 2).sum()) / n
    above = 4 * a * b * together
    return float(above / (apart + EPS)) if above else float(apart == 0)
