"""The six linked views of how pruned classifiers differ under corruptions, as data; pictures are their common key.

Li et al. 2022, "Understanding Robustness Lottery", https://arxiv.org/abs/2206.07918. Spec: robustness-lottery.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from secateur.comparison.geometry import Cloud, Condition, read_cloud
from secateur.comparison.rows import DENSE, Row
from secateur.errors import SecateurError
from secateur.measure.geometry import METRICS, distances, fragile, placed, robust, spanning_tree
from secateur.utils.screen import Screen

BINS = 10
PLACES = 1200
"""Representations that are laid on the plane, at most: with more, severities are left out, then the last models."""
SEVERITIES = ((1, 2, 3, 4, 5), (1, 3, 5), (3,))


@dataclass(repr=False)
class Seen(Screen):
    """A method at a target: what its first seed saw, and means over its seeds."""

    method: str
    target: str
    seeds: list[int]
    cloud: Cloud
    means: dict[str, list[float]]
    """accuracy, and mean and variance of angle, norm and margin, of each condition"""
    histogram: Tensor
    """int64 [K, 10]: pictures by their margin, within the same bounds everywhere"""


@dataclass(repr=False)
class Views(Screen):
    """Everything the views draw. R representations: one model under one condition."""

    models: list[Seen]
    conditions: list[Condition]
    labels: Tensor
    names: tuple[str, ...]
    bounds: tuple[float, float]
    """of the histograms of margins"""
    places: list[tuple[int, int, float, float]]
    """(model, condition, x, y): near each other where the geometry is alike"""
    edges: list[tuple[int, int, float]]
    """of the minimum spanning tree between places: (place, place, distance)"""
    alike: list[tuple[str, str, float]]
    """Corruptions whose geometry is closest over all models, closest first: (one, other, mean distance)"""
    fragile: list[int]
    """Pictures that the dense network names rightly when clean, and some model or condition doesn't; worst first"""
    robust: list[int]
    """Pictures that all models name rightly under all conditions"""
    left: list[tuple[str, str, int, str]] = field(default_factory=list)
    """(method, target, seed, why) of runs without a geometry"""


def views(folder: str | Path, rows: Sequence[Row], order: Sequence[tuple[str, str]] = ()) -> Views | None:
    """The views of a comparison that was made with `--geometry`; None where it wasn't.

    >>> found = views("out/digits", read_rows("out/digits"))  # doctest: +SKIP
    >>> found.alike[0]  # doctest: +SKIP
    ('gaussian_noise', 'shot_noise', 3.1)

    order: (method, target), those that count most first; the dense network is always first. Runs whose file can't be read are
    left out, with the reason in `left`.
    """
    clouds: dict[tuple[str, str], list[tuple[int, Row, Cloud]]] = {}
    left: list[tuple[str, str, int, str]] = []
    for row in sorted(rows, key=lambda row: row["seed"]):
        told = row.get("geometry")
        if not told:
            continue
        who = (row["method"], row["target"], row["seed"])
        try:
            cloud = read_cloud(folder, row)
        except SecateurError as error:
            left.append((*who, str(error)))
            continue
        if cloud is None:
            left.append((*who, told.get("not_measured", "nothing was kept")))
        else:
            clouds.setdefault(who[:2], []).append((row["seed"], row, cloud))
    if not clouds:
        return None
    rank = {key: number for number, key in enumerate(order, 1)} | {(DENSE, "100%"): 0}
    keys = sorted(clouds, key=lambda key: (rank.get(key, len(rank)), key))
    first = clouds[keys[0]][0][2]
    margins = torch.cat([found[0][2].metrics[:, 2].flatten() for found in clouds.values()])
    low, high = (torch.quantile(margins[:1_000_000], q).item() for q in (0.01, 0.99))
    models = [_seen(*key, clouds[key], (low, high)) for key in keys]
    places, edges = _laid(models)
    wrong = torch.cat([one.cloud.metrics[:, 2] for one in models])
    dense = first.metrics[0, 2] if keys[0][0] == DENSE else torch.ones(len(first.labels))
    return Views(
        models=models,
        conditions=first.conditions,
        labels=first.labels,
        names=first.names,
        bounds=(low, high),
        places=places,
        edges=edges,
        alike=_alike(models),
        fragile=fragile(dense, wrong).tolist(),
        robust=robust(wrong).nonzero().flatten().tolist(),
        left=left,
    )


def _seen(method: str, target: str, found: list[tuple[int, Row, Cloud]], bounds: tuple[float, float]) -> Seen:
    lines = [row["geometry"]["conditions"] for _, row, _ in found]
    columns = ["accuracy", *(f"{name}_{what}" for name in METRICS for what in ("mean", "variance"))]
    means = {
        name: [statistics.mean(line[k][2 + number] for line in lines) for k in range(len(lines[0]))]
        for number, name in enumerate(columns)
    }
    cloud = found[0][2]
    counts = [torch.histc(m.clamp(*bounds), BINS, *bounds).long() for m in cloud.metrics[:, 2]]
    return Seen(method, target, [seed for seed, _, _ in found], cloud, means, torch.stack(counts))


def _laid(
    models: Sequence[Seen],
) -> tuple[list[tuple[int, int, float, float]], list[tuple[int, int, float]]]:
    """Places on a plane by classical scaling, and the spanning tree over the true distances."""
    conditions = models[0].cloud.conditions
    for severities in SEVERITIES:
        which = [k for k, (_, severity) in enumerate(conditions) if severity in (0, *severities)]
        if len(models) * len(which) <= PLACES:
            break
    chosen = range(min(len(models), max(1, PLACES // len(which))))
    keys = [(m, k) for m in chosen for k in which]
    apart = distances([dict(zip(METRICS, models[m].cloud.metrics[k])) for m, k in keys])
    return (
        [(m, k, float(x), float(y)) for (m, k), (x, y) in zip(keys, placed(apart))],
        spanning_tree(apart),
    )


def _alike(models: Sequence[Seen], severity: int = 3, most: int = 5) -> list[tuple[str, str, float]]:
    """The corruptions that are closest in the mean over the models: of two such one may be left out."""
    conditions = models[0].cloud.conditions
    which = [k for k, (_, strength) in enumerate(conditions) if strength == severity]
    if len(which) < 2:
        return []
    total = np.zeros((len(which), len(which)))
    for model in models:
        total += distances([dict(zip(METRICS, model.cloud.metrics[k])) for k in which])
    pairs = [
        (conditions[which[i]][0], conditions[which[j]][0], total[i, j] / len(models))
        for i in range(len(which))
        for j in range(i)
    ]
    return sorted(((b, a, float(d)) for a, b, d in pairs), key=lambda pair: pair[2])[:most]


def beside(one: Cloud, other: Cloud, condition: int = 0) -> dict[str, Any]:
    """Two models under one condition (0: clean): accuracy, mean and variance of the metrics, by class too, and what flipped.

    >>> found = beside(pruned, dense)  # doctest: +SKIP
    >>> found["lost"]  # pictures that the first names wrongly, and the other rightly  # doctest: +SKIP
    [17, 113]

    Gives `models` (one and other: accuracy, and per metric mean and variance), `classes` {label: the same} and the pictures
    `lost` and `won`. Raises `SecateurError` for models that saw other pictures.
    """
    if one.conditions != other.conditions or not torch.equal(one.labels, other.labels):
        raise SecateurError(
            "they didn't see the same pictures", where="beside", fix="take two runs of one comparison"
        )
    rights = [cloud.right[condition] for cloud in (one, other)]

    def figures(which: Tensor) -> list[dict[str, float]]:
        made = []
        for cloud, right in zip((one, other), rights):
            values = cloud.metrics[condition][:, which].double()
            told = {"accuracy": right[which].double().mean().item()}
            for name, row in zip(METRICS, values):
                told |= {f"{name}_mean": row.mean().item(), f"{name}_variance": row.var(correction=0).item()}
            made.append(told)
        return made

    return {
        "models": figures(torch.ones_like(one.labels, dtype=torch.bool)),
        "classes": {int(label): figures(one.labels == label) for label in one.labels.unique()},
        "lost": (~rights[0] & rights[1]).nonzero().flatten().tolist(),
        "won": (rights[0] & ~rights[1]).nonzero().flatten().tolist(),
    }
