"""Qwen-VL: pictures of any size packed into one sequence, 2 x 2 patches a token, rotary positions in three axes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from secateur.families.vlm.facts import Family, Layout


def layout(model: Any, inputs: Mapping[str, Any]) -> dict[str, Layout]:
    """Patches lie in groups of one token each, groups in raster order; windows are permuted later, by `windows`."""
    side = model.config.vision_config.spatial_merge_size
    layouts: dict[str, Layout] = {}
    for kind, pixels in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        grid = inputs.get(f"{kind}_grid_thw")
        if inputs.get(pixels) is None or grid is None:
            continue
        parts: list[Tensor] = []
        shapes: list[tuple[int, int]] = []
        owner: list[int] = []
        for image, (t, h, w) in enumerate(grid.tolist()):
            rows, cols = h // side, w // side
            place = torch.arange(t * rows * cols)
            frame, row, col = place // (rows * cols), place // cols % rows, place % cols
            parts.append(torch.stack([torch.full_like(place, image), frame, row, col, frame + len(shapes)]))
            # a frame is a sequence of its own in the tower
            shapes += [(rows, cols)] * t
            owner += [image] * t
        image_, frame, row, col, crop = torch.cat(parts, 1)  # [N] each
        merge = side * side
        layouts[kind] = Layout(
            image=image_,
            crop=crop,
            frame=frame,
            grid_row=row,
            grid_col=col,
            newline=torch.zeros(len(image_), dtype=torch.bool),
            patches=torch.arange(len(image_) * merge).view(-1, merge),
            grid=torch.tensor(shapes),
            crop_image=torch.tensor(owner),
            total_patches=len(image_) * merge,
        )
    return layouts


def windows(model: Any, grid: Tensor) -> Tensor:
    """The patch in each slot of a tower that works in windows."""
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import get_vision_window_index

    tower = model.get_encoder("image")
    unit = tower.spatial_merge_unit
    index, _ = get_vision_window_index(
        grid,
        spatial_merge_size=tower.spatial_merge_size,
        window_size=tower.window_size,
        patch_size=tower.patch_size,
        kwargs={},
    )
    return (index[:, None] * unit + torch.arange(unit, device=index.device)).flatten()


def _blocks(tower: Any) -> nn.ModuleList:
    return tower.blocks


def _mergers(tower: Any) -> Sequence[nn.Module]:
    return (tower.merger, *getattr(tower, "deepstack_merger_list", ()))


def _merge(model: Any) -> int:
    return model.config.vision_config.spatial_merge_size**2


def _deepstack(model: Any) -> int:
    return len(getattr(model.config.vision_config, "deepstack_visual_indexes", ()))


def _no_prefix(tower: nn.Module) -> int:
    return 0


def family(name: str, permuted: bool = False) -> Family:
    """A Qwen-VL family. `permuted`: the tower reorders its patches by windows."""
    return Family(
        name,
        _blocks,
        _no_prefix,
        layout=layout,
        merge=_merge,
        packed=True,
        order=windows if permuted else None,
        full_before=_mergers,
        mrope=True,
        first_layer=_deepstack,
        video=True,
    )


QWEN2, QWEN2_5, QWEN3 = family("qwen2_vl"), family("qwen2_5_vl", permuted=True), family("qwen3_vl")
