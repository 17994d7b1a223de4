"""How a classifier's last features lie to its classes: angle, length and margin of each sample.

Li et al. 2022, "Understanding Robustness Lottery", https://arxiv.org/abs/2206.07918. Spec: robustness-lottery.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.sparse.csgraph import minimum_spanning_tree
from torch import Tensor, nn

from secateur.errors import SecateurError
from secateur.utils.running import evaluating
from secateur.utils.screen import Screen

METRICS = ("angle", "norm", "margin")
EXACT = "donot_use_mm_for_euclid_dist"
"""How equal rows are at distance 0."""


@dataclass(repr=False)
class Geometry(Screen):
    """What N samples look like from the last linear layer. Angles in degrees."""

    angle: Tensor
    """[N] between a sample's features and the direction of its own class; small: aligned."""
    norm: Tensor
    """[N] length of the features: how sure the network is."""
    margin: Tensor
    """[N] distance to the nearest boundary of the predicted class; negative where that is wrong."""
    angles: Tensor
    """[N, classes] to the directions of all classes."""
    predicted: Tensor
    """[N] int64"""

    @property
    def accuracy(self) -> float:
        return (self.margin > 0).double().mean().item()

    def summary(self) -> dict[str, float]:
        """Mean and variance of each metric, and the accuracy."""
        rows = {name: getattr(self, name).double() for name in METRICS}
        found = {f"{name}_mean": values.mean().item() for name, values in rows.items()}
        found |= {f"{name}_variance": values.var(correction=0).item() for name, values in rows.items()}
        return found | {"accuracy": self.accuracy}


def geometry(features: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Geometry:
    """The geometry of features [N, d] that enter a linear layer with weight [classes, d].

    >>> geometry(torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0, 0], [0, 2]]), None, torch.tensor([1])).angle
    tensor([36.8699])

    A sample of length 0 has the angle 90. Classes of equal weights have no boundary between them. Raises `SecateurError` for
    labels outside the classes, and shapes that don't fit.
    """
    if (
        features.ndim != 2
        or weight.ndim != 2
        or features.shape[1] != weight.shape[1]
        or labels.shape != features.shape[:1]
    ):
        raise SecateurError(
            f"features {tuple(features.shape)}, weight {tuple(weight.shape)} and labels {tuple(labels.shape)} don't fit",
            where="geometry",
            fix="give [N, d], [classes, d] and [N]",
        )
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < len(weight):
        raise SecateurError(
            f"labels reach from {int(labels.min())} to {int(labels.max())} in {len(weight)} classes",
            where="geometry",
            fix=f"use labels 0..{len(weight) - 1}",
        )
    x, w = features.double(), weight.double()
    logits = x @ w.T + (0 if bias is None else bias.double())
    norm, lengths = x.norm(dim=1), w.norm(dim=1)
    cosine = (x @ w.T) / (norm[:, None] * lengths).clamp_min(torch.finfo(torch.float64).tiny)
    angles = torch.rad2deg(cosine.clamp(-1, 1).arccos())
    predicted = logits.argmax(1)
    apart = torch.cdist(w, w, compute_mode=EXACT)[predicted]
    gaps = logits.gather(1, predicted[:, None]) - logits
    margin = torch.where(apart > 0, gaps / apart.clamp_min(1e-300), torch.inf).amin(1)
    margin = torch.where(predicted == labels, margin, -margin)
    own = angles.gather(1, labels[:, None])[:, 0]
    own, norm, margin, angles = (t.to(features.dtype) for t in (own, norm, margin, angles))
    return Geometry(own, norm, margin, angles, predicted)


@torch.no_grad()
def of_model(model: nn.Module, pictures: Tensor, labels: Tensor, batch: int = 256) -> Geometry:
    """The geometry of a classifier's last linear layer on pictures [N, ...] with their labels [N].

    >>> of_model(load_network("digits"), *load_digits("test")).summary()["accuracy"]  # doctest: +SKIP
    0.9924

    Raises `SecateurError` where the network doesn't end in a linear layer over its classes.
    """
    last: list[tuple[nn.Linear, Tensor]] = []
    handles = [
        m.register_forward_hook(lambda m, args, out: last.append((m, args[0].detach())))
        for m in model.modules()
        if isinstance(m, nn.Linear)
    ]
    found, layer = [], None
    first = next(model.parameters())
    try:
        with evaluating(model):
            for part in pictures.split(batch):
                last.clear()
                logits = model(part.to(first.device, first.dtype))
                if not last or last[-1][1].ndim != 2 or not _gives(*last[-1], logits):
                    raise SecateurError(
                        "it doesn't end in a linear layer over its classes",
                        where=type(model).__name__,
                        fix="take a classifier that does",
                    )
                layer = last[-1][0]
                found.append(last[-1][1].float().cpu())
    finally:
        for handle in handles:
            handle.remove()
    assert layer is not None
    bias = None if layer.bias is None else layer.bias.float().cpu()
    return geometry(torch.cat(found), layer.weight.float().cpu(), bias, labels)


def _gives(layer: nn.Linear, features: Tensor, logits: Any) -> bool:
    return isinstance(logits, Tensor) and torch.equal(
        nn.functional.linear(features, layer.weight, layer.bias), logits
    )


def occlusion(
    model: nn.Module,
    picture: Tensor,
    label: int,
    patch: int = 4,
    stride: int = 2,
    fill: float | Tensor = 0.0,
    batch: int = 256,
) -> tuple[Geometry, dict[str, Tensor]]:
    """(geometry of a picture [C, H, W], how much each metric changes where a patch is laid over it, [rows, columns] each).

    >>> base, change = occlusion(resnet, picture, 3)  # doctest: +SKIP
    >>> change["margin"].argmin()  # where the answer hangs most  # doctest: +SKIP

    patch, stride: pixels; the last patch of a row or column ends at the border. fill: what is laid over it, a number or a value a
    channel, as the network wants its pictures. Raises `SecateurError` for a patch that doesn't fit, and as `of_model` does.
    """
    high, wide = picture.shape[-2:]
    if picture.ndim != 3 or stride < 1 or not 1 <= patch <= min(high, wide):
        raise SecateurError(
            f"a patch of {patch} in steps of {stride} doesn't fit a picture {tuple(picture.shape)}",
            where="occlusion",
            fix="give [C, H, W], and a patch within it",
        )
    rows, columns = (sorted({*range(0, size - patch, stride), size - patch}) for size in (high, wide))
    seen = picture.repeat(1 + len(rows) * len(columns), 1, 1, 1)
    value = torch.as_tensor(fill, dtype=picture.dtype).reshape(-1, 1, 1)
    for number, (row, column) in enumerate(((r, c) for r in rows for c in columns), 1):
        seen[number, :, row : row + patch, column : column + patch] = value
    found = of_model(model, seen, torch.full((len(seen),), label), batch)
    values = {name: getattr(found, name) for name in METRICS}
    changes = {name: (v[1:] - v[0]).reshape(len(rows), len(columns)) for name, v in values.items()}
    return Geometry(*(t[:1] for t in (*values.values(), found.angles, found.predicted))), changes


def distances(found: Sequence[Mapping[str, Tensor] | Geometry]) -> np.ndarray:
    """float64 [R, R]: how far apart R representations of the same samples are.

    Each metric is z-scored over all representations and samples (population deviation; all equal: zeros), then the
    three blocks of a representation are one vector.
    """
    blocks = []
    for name in METRICS:
        rows = [one[name] if isinstance(one, Mapping) else getattr(one, name) for one in found]
        if len({len(row) for row in rows}) != 1:
            raise SecateurError(
                f"representations of {sorted({len(row) for row in rows})} samples",
                where="distances",
                fix="use the same samples for all",
            )
        values = torch.stack([row.double() for row in rows])
        deviation = values.std(correction=0)
        blocks.append((values - values.mean()) / deviation if deviation > 0 else torch.zeros_like(values))
    vectors = torch.cat(blocks, 1)
    return torch.cdist(vectors, vectors, compute_mode=EXACT).numpy()


def spanning_tree(apart: np.ndarray) -> list[tuple[int, int, float]]:
    """The edges of the minimum spanning tree over distances [R, R]: (row, column, distance), shortest first."""
    tree = minimum_spanning_tree(np.triu(apart)).tocoo()
    return sorted(
        ((int(min(i, j)), int(max(i, j)), float(d)) for i, j, d in zip(tree.row, tree.col, tree.data)),
        key=lambda edge: (edge[2], edge[:2]),
    )


def placed(apart: np.ndarray) -> np.ndarray:
    """float64 [R, 2]: places on a plane, by classical scaling, whose distances are near these; signs are fixed."""
    count = len(apart)
    centre = np.eye(count) - 1 / count
    values, vectors = np.linalg.eigh(-0.5 * centre @ apart**2 @ centre)
    order = np.argsort(values)[::-1][:2]
    found = vectors[:, order] * np.sqrt(np.clip(values[order], 0, None))
    found = found * np.where(found[np.abs(found).argmax(0), np.arange(found.shape[1])] < 0, -1, 1)
    return np.pad(found, ((0, 0), (0, 2 - found.shape[1])))


def robust(margins: Tensor) -> Tensor:
    """bool [N] of margins [models, N]: right in all of them."""
    return (margins > 0).all(0)


def fragile(clean: Tensor, margins: Tensor) -> Tensor:
    """int64: samples that are right in the clean dense model (margin [N]) and wrong in at least one of [models, N], worst first."""
    which = ((clean > 0) & (margins < 0).any(0)).nonzero().flatten()
    return which[margins.amin(0)[which].argsort(stable=True)]
