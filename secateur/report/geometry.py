"""The six linked views of a comparison as the page needs them: numbers packed small, pictures in two sheets."""

from __future__ import annotations

import base64
import gzip
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from secateur.comparison.rows import DENSE, Row
from secateur.comparison.summary import Line
from secateur.comparison.views import Seen, Views, views

LIMIT = 5_000_000
"""Bytes of single pictures' figures, before they are compressed: the best models' come first, others are rows of the table alone."""
COLUMNS = 20
GREY, JPEG = 1, 85
STEPS = 65_535


def geometry_data(folder: str | Path, rows: Sequence[Row], lines: Sequence[Line]) -> dict[str, Any] | None:
    """What the page draws the views from; None for a comparison without `--geometry`."""
    ranked = sorted((line for line in lines if line.rank), key=lambda line: line.rank or 0)
    found = views(folder, rows, [(line.method, line.target) for line in ranked])
    return None if found is None else packed(found)


def packed(found: Views, limit: int = LIMIT) -> dict[str, Any]:
    """The views as JSON, with the figures of single pictures as compressed bytes.

    `blob`: of each shown model uint16 [K, 4, N] (angle, norm, margin within `bounds`, and the predicted class), then of each uint8
    [K, A, N] (degrees), then of each uint8 [P, 3, rows, columns] (128 is no change, 255 `scales`).
    """
    first = found.models[0].cloud
    each = first.metrics.numel() * 2 + first.predicted.numel() * 2 + first.angles.numel()
    shown = found.models[: max(2, limit // each)]
    values = np.stack([one.cloud.metrics.double().numpy() for one in shown])
    spans = [(0.0, 180.0), (0.0, float(values[:, :, 1].max())), _span(values[:, :, 2])]
    numbers = [
        np.clip(np.rint((values[:, :, i] - low) / max(high - low, 1e-12) * STEPS), 0, STEPS)
        for i, (low, high) in enumerate(spans)
    ]
    numbers.append(np.stack([one.cloud.predicted.numpy() for one in shown]))
    degrees = np.stack([np.rint(one.cloud.angles.double().numpy()) for one in shown])
    changes = [_changes(one.cloud.changes) for one in shown]
    raw = b"".join(
        (
            np.stack(numbers, 2).astype("<u2").tobytes(),
            degrees.astype("u1").tobytes(),
            *(levels.tobytes() for levels, _ in changes),
        )
    )
    place = {id(one): number for number, one in enumerate(shown)}
    return {
        "conditions": found.conditions,
        "labels": found.labels.tolist(),
        "names": list(found.names),
        "axes": first.axes,
        "models": [_row(one) for one in shown],
        "rest": [_row(one) for one in found.models if id(one) not in place],
        "bounds": spans,
        "span": [_short(v) for v in found.bounds],
        "places": [[m, k, _short(x), _short(y)] for m, k, x, y in found.places],
        "edges": [[i, j] for i, j, _ in found.edges],
        "alike": [[a, b, _short(d)] for a, b, d in found.alike],
        "fragile": found.fragile,
        "robust": found.robust,
        "left": found.left,
        "occluded": first.occluded,
        "patch": first.patch,
        "map": list(first.changes.shape[2:]),
        "scales": [scale for _, scale in changes],
        "blob": base64.b64encode(gzip.compress(raw, mtime=0)).decode(),
        "sheets": _sheets(found.models),
    }


def _row(one: Seen) -> dict[str, Any]:
    return {
        "method": one.method,
        "target": one.target,
        "seeds": one.seeds,
        "accuracy": [round(v, 4) for v in one.means["accuracy"]],
        "margin": [_short(v) for v in one.means["margin_mean"]],
        "histogram": one.histogram.tolist(),
    }


def _span(values: np.ndarray) -> tuple[float, float]:
    return float(values.min()), float(values.max())


def _short(value: float) -> float:
    """Four digits, and no infinity, which JSON hasn't."""
    return float(f"{value:.4g}") if math.isfinite(value) else 0.0


def _changes(found: Tensor) -> tuple[np.ndarray, list[float]]:
    """(uint8 [P, 3, rows, columns] around 128, the change at 255 of each metric)."""
    values = found.double().numpy()
    scales = np.abs(values).max((0, 2, 3)).clip(1e-12)
    levels = np.rint(values / scales[:, None, None] * 127) + 128
    return levels.astype("u1"), [_short(s) for s in scales]


def _sheets(models: Sequence[Seen]) -> dict[str, Any] | None:
    """The clean pictures, 20 a row, and the shown ones, a row a condition; None where no run kept them."""
    cloud = next((one.cloud for one in models if one.method == DENSE and one.cloud.clean is not None), None)
    if cloud is None or cloud.clean is None or cloud.corrupted is None:
        return None
    count, channels, high, wide = cloud.clean.shape
    rows = -(-count // COLUMNS)
    clean = np.zeros((rows * COLUMNS, channels, high, wide), np.uint8)
    clean[:count] = cloud.clean.numpy()
    return {
        "high": high,
        "wide": wide,
        "columns": COLUMNS,
        "shown": cloud.shown,
        "clean": _image(clean.reshape(rows, COLUMNS, channels, high, wide)),
        "corrupted": _image(cloud.corrupted.numpy()),
    }


def _image(tiles: np.ndarray) -> str:
    """A sheet of tiles [rows, columns, C, h, w] as a data URL: PNG where they are grey, else JPEG."""
    from PIL import Image

    rows, columns, channels, high, wide = tiles.shape
    sheet = tiles.transpose(0, 3, 1, 4, 2).reshape(rows * high, columns * wide, channels)
    file = io.BytesIO()
    if channels == GREY:
        Image.fromarray(sheet[:, :, 0]).save(file, "PNG", optimize=True)
    else:
        Image.fromarray(sheet).save(file, "JPEG", quality=JPEG, subsampling=0)
    kind = "png" if channels == GREY else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"
