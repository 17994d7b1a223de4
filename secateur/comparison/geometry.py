"""How a run's last features lie to the classes, clean and under common corruptions, as a file beside the rows.

Li et al. 2022, "Understanding Robustness Lottery", https://arxiv.org/abs/2206.07918. Spec: robustness-lottery.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from secateur.comparison.rows import Row, key_of
from secateur.comparison.setup import Setup
from secateur.data.corruptions import KINDS, LARGE, SEVERITIES, common, corrupt
from secateur.data.pictures import Pictures
from secateur.errors import SecateurError, choose
from secateur.measure.geometry import METRICS, Geometry, occlusion, of_model
from secateur.utils.files import atomic_write_bytes
from secateur.utils.screen import Screen, counted

FORMAT, VERSION, FOLDER = "secateur-geometry", "1", "geometry"
CLEAN = ("clean", 0)
AXES, MOST = 12, 20
"""Of more than 20 classes, the angles to the 12 that the dense network names most often are kept."""
OCCLUDED = 6
"""Pictures over which a patch is slid: those nearest to a boundary of the dense network."""
SHOWN, THUMB = 1_300_000, 64
"""Pixels of corrupted pictures that are kept to be shown, and the longest side of one."""
AT_ONCE = 2_000_000
"""Pixels of a batch: 40 pictures of 224 x 224, 256 small ones."""
HELD = 400_000_000
"""Bytes of corrupted pictures that are held from one run to the next; more are made anew."""
Condition = tuple[str, int]


@dataclass(repr=False)
class Cloud(Screen):
    """What one run's file holds. K conditions, the clean one first; N pictures, the same in all runs of a comparison."""

    conditions: list[Condition]
    """(corruption, severity)"""
    labels: Tensor
    """int64 [N]"""
    metrics: Tensor
    """float32 [K, 3, N]: angle in degrees, norm, margin"""
    angles: Tensor
    """float32 [K, A, N], to the directions of the classes `axes`"""
    axes: list[int]
    predicted: Tensor
    """int64 [K, N]"""
    occluded: list[int]
    """Pictures over which a patch was slid,"""
    patch: int
    changes: Tensor
    """and by how much that changed the three metrics, float32 [P, 3, rows, columns]"""
    names: tuple[str, ...] = ()
    """of the classes"""
    clean: Tensor | None = None
    """uint8 [N, C, h, w]: the pictures, small; of the dense network's file alone"""
    shown: list[int] | None = None
    """Pictures that are there under all conditions too,"""
    corrupted: Tensor | None = None
    """uint8 [K, S, C, h, w]"""

    @property
    def right(self) -> Tensor:
        """bool [K, N]"""
        return self.predicted == self.labels


class Lens:
    """Looks at every network of a comparison in the same way: the same pictures under the same corruptions."""

    def __init__(self, pictures: Pictures, names: Sequence[str], dense: nn.Module):
        self.pictures, self.names = pictures, tuple(names)
        self.conditions: list[Condition] = [CLEAN, *((name, s) for name in names for s in SEVERITIES)]
        self.batch = max(1, min(256, AT_ONCE // pictures.pixels[0, 0].numel()))
        seen = of_model(dense, pictures.ready(pictures.pixels), pictures.labels, self.batch)
        self.order = seen.margin.abs().argsort(stable=True).tolist()
        classes = seen.angles.shape[1]
        self.axes = list(range(classes))
        if classes > MOST:
            often = torch.bincount(seen.predicted, minlength=classes)
            self.axes = sorted(often.argsort(descending=True, stable=True)[:AXES].tolist())
        self.fill = pictures.ready(pictures.pixels).mean((0, 2, 3))
        self.held: dict[Condition, Tensor] = {}

    def under(self, condition: Condition) -> Tensor:
        """The pictures under a condition, float32 [N, C, H, W] in 0..1."""
        if condition == CLEAN:
            return self.pictures.pixels
        if condition in self.held:
            return self.held[condition].float() / 255
        found = corrupt(self.pictures.pixels, *condition)
        if found.numel() * len(self.conditions) <= HELD:
            self.held[condition] = (found * 255).round().to(torch.uint8)
        return found

    def look(self, model: nn.Module, pictures: bool = False) -> Cloud:
        """The geometry of a network under all conditions; with `pictures` also what they look like.

        Raises `SecateurError` where it doesn't end in a linear layer over its classes.
        """
        labels = self.pictures.labels
        found: list[Geometry] = []
        for condition in self.conditions:
            found.append(of_model(model, self.pictures.ready(self.under(condition)), labels, self.batch))
        side = min(self.pictures.pixels.shape[2:])
        patch = side // 7 if side >= LARGE else max(2, side // 8)
        occluded, changes = self.order[:OCCLUDED], []
        for number in occluded:
            picture = self.pictures.ready(self.pictures.pixels[number])
            label = int(labels[number])
            _, moved = occlusion(model, picture, label, patch, patch // 2, self.fill, self.batch)
            changes.append(torch.stack([moved[name] for name in METRICS]))
        return Cloud(
            conditions=self.conditions,
            labels=labels,
            metrics=torch.stack([torch.stack([getattr(one, m) for m in METRICS]) for one in found]),
            angles=torch.stack([one.angles[:, self.axes].T for one in found]),
            axes=self.axes,
            predicted=torch.stack([one.predicted for one in found]),
            occluded=occluded,
            patch=patch,
            changes=torch.stack(changes),
            names=self.pictures.names,
            **(self._pictures() if pictures else {}),
        )

    def _pictures(self) -> dict[str, Any]:
        clean = thumbnails(self.pictures.pixels)
        shown = self.order[: max(OCCLUDED, SHOWN // (len(self.conditions) * clean[0, 0].numel()))]
        made = torch.stack([thumbnails(self.under(condition)[shown]) for condition in self.conditions])
        return {"clean": clean, "shown": shown, "corrupted": made}


def thumbnails(pixels: Tensor) -> Tensor:
    """uint8 [N, C, h, w] of pictures in 0..1, no side longer than 64."""
    longest = max(pixels.shape[2:])
    if longest > THUMB:
        size = tuple(max(1, round(s * THUMB / longest)) for s in pixels.shape[2:])
        pixels = F.interpolate(pixels, size, mode="area")
    return (pixels.clamp(0, 1) * 255).round().to(torch.uint8)


def chosen(wanted: str, channels: int) -> tuple[str, ...]:
    """The corruptions of `common` (fifteen), `all` (with the four held out), or names with commas.

    >>> chosen("fog,snow", 3)
    ('fog', 'snow')

    Raises `SecateurError` for a name nobody knows, one that is given twice, and `saturate` without colours.
    """
    if wanted in ("common", "all"):
        return common(channels, wanted == "all")
    names = tuple(name.strip() for name in wanted.split(","))
    for name in names:
        choose(name, tuple(KINDS), what="corruption", where="geometry_corruptions", near=2)
        if name not in common(channels, True):
            raise SecateurError(
                "the pictures have no colours", where=f"geometry_corruptions: {name}", fix="leave it out"
            )
    if len(set(names)) < len(names):
        raise SecateurError("one is named twice", where="geometry_corruptions", fix="name each once")
    return names


def lens(setup: Setup, pictures: Pictures, dense: nn.Module) -> Lens:
    """How the networks of a comparison are looked at."""
    return Lens(pictures, chosen(setup.geometry_corruptions, pictures.pixels.shape[1]), dense)


def measured(view: Lens, model: nn.Module, pictures: bool = False) -> dict[str, Any]:
    """What a row holds of a run's geometry, with the file's bytes, which `kept` puts beside the rows."""
    try:
        cloud = view.look(model, pictures)
    except SecateurError as error:
        return {"not_measured": " ".join(str(error).split())}
    return {"conditions": said(cloud), "bytes": as_bytes(cloud)}


def said(cloud: Cloud) -> list[list[Any]]:
    """[corruption, severity, accuracy, mean and variance of angle, norm, margin] of each condition."""
    right = cloud.right.double().mean(1)
    means, spread = cloud.metrics.double().mean(2), cloud.metrics.double().var(2, correction=0)
    return [
        [
            *condition,
            right[k].item(),
            *(round(v, 6) for pair in zip(means[k].tolist(), spread[k].tolist()) for v in pair),
        ]
        for k, condition in enumerate(cloud.conditions)
    ]


def as_bytes(cloud: Cloud) -> bytes:
    """The file of a cloud."""
    tensors = {
        "labels": cloud.labels.to(torch.int16),
        "metrics": cloud.metrics.float(),
        "angles": cloud.angles.half(),
        "predicted": cloud.predicted.to(torch.int16),
        "changes": cloud.changes.float(),
    }
    tensors |= {name: value for name in ("clean", "corrupted") if (value := getattr(cloud, name)) is not None}
    about = {
        name: getattr(cloud, name) for name in ("conditions", "axes", "occluded", "patch", "names", "shown")
    }
    tensors = {name: value.contiguous() for name, value in tensors.items()}
    return save(tensors, {"format": FORMAT, "version": VERSION, "about": json.dumps(about)})


def kept(folder: Path, row: Row) -> Row:
    """The row without the bytes of its geometry, which lie in a file of the folder now."""
    found = row.get("geometry")
    if not isinstance(found, dict) or "bytes" not in found:
        return row
    method, target, seed = key_of(row)
    name = f"{method}-{target.rstrip('%')}-{seed}.safetensors"
    (folder / FOLDER).mkdir(exist_ok=True)
    atomic_write_bytes(folder / FOLDER / name, found["bytes"])
    return row | {"geometry": {"conditions": found["conditions"], "file": name}}


def read_cloud(folder: str | Path, row: Mapping[str, Any]) -> Cloud | None:
    """The geometry of a run; None where the row has none.

    Raises `SecateurError` where its file is missing, damaged, or of another version.
    """
    name = (row.get("geometry") or {}).get("file")
    if name is None:
        return None
    file = Path(folder) / FOLDER / Path(str(name)).name
    return _read(file, file.stat().st_mtime_ns if file.is_file() else 0)


@functools.lru_cache(maxsize=64)
def _read(file: Path, stamp: int) -> Cloud:
    fix = "take the row out of rows.jsonl and compare again"
    try:
        with safe_open(file, "pt") as found:
            names = found.keys()
            tensors = {name: found.get_tensor(name) for name in names}
            told = found.metadata() or {}
        if (told.get("format"), told.get("version")) != (FORMAT, VERSION):
            raise SecateurError("it is of another version", where=str(file), fix=fix)
        about = json.loads(told["about"])
        cloud = Cloud(
            conditions=[(str(name), int(severity)) for name, severity in about["conditions"]],
            labels=tensors["labels"].long(),
            metrics=tensors["metrics"],
            angles=tensors["angles"].float(),
            axes=about["axes"],
            predicted=tensors["predicted"].long(),
            occluded=about["occluded"],
            patch=about["patch"],
            changes=tensors["changes"],
            names=tuple(about["names"]),
            clean=tensors.get("clean"),
            shown=about["shown"],
            corrupted=tensors.get("corrupted"),
        )
    except FileNotFoundError as error:
        raise SecateurError("it is missing", where=str(file), fix=fix) from error
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise SecateurError(f"it can't be read ({error})", where=str(file), fix=fix) from error
    count, kinds = len(cloud.labels), len(cloud.conditions)
    whole = cloud.metrics.shape == (kinds, len(METRICS), count) and cloud.predicted.shape == (kinds, count)
    if not whole or cloud.angles.shape != (kinds, len(cloud.axes), count):
        raise SecateurError(
            f"its tensors don't fit {counted(kinds, 'condition')} and {counted(count, 'picture')}",
            where=str(file),
            fix=fix,
        )
    return cloud
