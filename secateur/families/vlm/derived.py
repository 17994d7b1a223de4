"""Families that no file describes: what the engine needs is read off the config, the modules and what the model's encoder gives.

Only models that take features made outside (`mm_encoder_outputs`) can be derived. The first inputs prove the result.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from secateur.families.vlm.facts import Family, Layout, encoder_of, parts_of, placeholder
from secateur.families.vlm.llava import blocks_of, prefix_of


def sees_and_writes(model: Any) -> bool:
    """Whether it is a model of transformers that takes pictures and text."""
    if not hasattr(model, "config") or not hasattr(model, "base_model"):
        return False
    names = inspect.signature(type(model).forward).parameters
    pictured = any("pixel" in name for name in names) or "image" in getattr(model, "input_modalities", ())
    return "input_ids" in names and pictured


def refusal(model: Any) -> str | None:
    """Why a vision-language model can't be derived; None where it can.

    >>> refusal(transformers.BlipForConditionalGeneration(config))  # doctest: +SKIP
    'its forward takes no features made outside (mm_encoder_outputs)'
    """
    if not hasattr(encoder_of(model, "image"), "get_image_features"):
        return "it has no get_image_features"
    if not hasattr(model, "generate"):
        return "it has no language head; give the model that generates, not its base"
    if "mm_encoder_outputs" not in inspect.signature(type(model).forward).parameters:
        return "its forward takes no features made outside (mm_encoder_outputs)"
    pixels = inspect.signature(type(model).generate).parameters.get("pixel_values")
    if pixels is not None and pixels.default is inspect.Parameter.empty:
        return "its generate encodes the pictures itself"
    if getattr(model.config, "is_encoder_decoder", False):
        return "its encoder reads pictures and text together, and its decoder attends to both"
    return None


def derive(model: Any) -> Family:
    """The family of a model that `refusal` has nothing against."""
    base = encoder_of(model, "image")
    packed = "image_grid_thw" in inspect.signature(base.get_image_features).parameters
    return Family(
        model.config.model_type,
        blocks_of,
        prefix_of,
        layout=_nothing,
        measure=_rows_of_grids if packed else _rows,
        merge=_one,
        mrope=hasattr(base, "compute_3d_position_ids"),
        first_layer=_after_deepstack,
        video=hasattr(base, "get_video_features"),
        observed=True,
        proven=False,
    )


def _nothing(model: Any, inputs: Mapping[str, Any]) -> dict[str, Layout]:
    return {}


def _one(model: Any) -> int:
    return 1


def _after_deepstack(model: Any) -> int:
    """The layer after the last to which features of the tower are added."""
    vision = getattr(model.config, "vision_config", None)
    added = getattr(vision, "deepstack_visual_indexes", None) or ()
    layers = getattr(model.config, "deepstack_layer_map", None) or ()
    return max([len(added), *(int(layer) + 1 for _, layer in layers)])


def _rows(model: Any, inputs: Mapping[str, Any], kind: str, output: Any) -> Layout:
    """Each picture's tokens in one row: how they lie on it can't be told from outside."""
    shown = _pictures(inputs, kind)
    counts = [len(part) for part in parts_of(output, shown)]
    if set(counts) == {1}:
        # an encoder of patches says nothing of pictures; in the prompt each is a run
        return _told(rows_of(_runs(inputs["input_ids"] == placeholder(model, kind))), kind)
    frames = len(counts) // shown if kind == "video" and len(counts) % shown == 0 else 1
    return _told(rows_of(counts, frames), kind)


def _told(layout: Layout, kind: str) -> Layout:
    """The layout; where a video isn't divided into frames, they aren't known (-1)."""
    if kind == "video" and len(layout) and not bool(layout.frame.any()):
        layout.frame = torch.full_like(layout.frame, -1)
    return layout


def _runs(visual: Tensor) -> list[int]:
    """Lengths of the runs of True in each row of a bool [B, L].

    >>> _runs(torch.tensor([[True, True, False, True]]))
    [2, 1]
    """
    edges = torch.nn.functional.pad(visual, (1, 1)).int().diff(dim=1)
    starts, ends = (edges == 1).nonzero()[:, 1], (edges == -1).nonzero()[:, 1]
    return (ends - starts).tolist()


def _rows_of_grids(model: Any, inputs: Mapping[str, Any], kind: str, output: Any) -> Layout:
    """Grids as the inputs say, where they hold as many tokens as came; else rows."""
    grid = inputs.get(f"{kind}_grid_thw")
    if grid is None:
        return _rows(model, inputs, kind, output)
    shapes = [tuple(map(int, g)) for g in grid.tolist()]
    parts = parts_of(output, len(shapes))
    counts = [len(part) for part in parts]
    if len(counts) != len(shapes):
        return _told(rows_of(counts), kind)
    sides = {round((t * h * w / n) ** 0.5) for (t, h, w), n in zip(shapes, counts) if n}
    side = sides.pop() if len(sides) == 1 else 0
    if not side or any(t * (h // side) * (w // side) != n for (t, h, w), n in zip(shapes, counts)):
        return _told(rows_of(counts), kind)
    return _grids([(t, h // side, w // side) for t, h, w in shapes])


def _pictures(inputs: Mapping[str, Any], kind: str) -> int:
    pixels = inputs.get("pixel_values" if kind == "image" else "pixel_values_videos")
    return len(pixels) if pixels is not None else 1


def rows_of(counts: Sequence[int], frames: int = 1) -> Layout:
    """Pictures of so many tokens each, of which no place is known; so many `frames` after each other are one video."""
    crop = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(list(counts), dtype=torch.int64))
    zero = torch.zeros_like(crop)
    return Layout(
        image=crop // frames,
        crop=crop,
        frame=crop % frames,
        grid_row=zero,
        grid_col=zero,
        newline=zero.bool(),
        patches=torch.full((len(crop), 1), -1),
        grid=torch.zeros(len(counts), 2, dtype=torch.int64),
        crop_image=torch.arange(len(counts)) // frames,
    )


def _grids(shapes: Sequence[tuple[int, int, int]]) -> Layout:
    """Frames of a grid one after another, each in raster order."""
    layout = rows_of([h * w for t, h, w in shapes for _ in range(t)])  # every frame a crop
    frames = torch.tensor([t for t, _, _ in shapes])
    layout.crop_image = torch.arange(len(shapes)).repeat_interleave(frames)
    layout.grid = torch.tensor([[h, w] for _, h, w in shapes])[layout.crop_image]
    layout.image = layout.crop_image[layout.crop]
    layout.frame = layout.crop - (frames.cumsum(0) - frames)[layout.image]
    place = torch.cat([torch.arange(h * w) for t, h, w in shapes for _ in range(t)])
    wide = layout.grid[layout.crop, 1]
    layout.grid_row, layout.grid_col = place // wide, place % wide
    return layout
