"""PaliGemma (every patch a token, the prefix sees itself both ways) and Gemma 3 (average pooling, images see themselves)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from secateur.families.vlm.facts import Family, Layout, each_patch, grids, picture_sizes
from secateur.families.vlm.llava import blocks_of, prefix_of


def _paligemma(model: Any, inputs: Mapping[str, Any]) -> dict[str, Layout]:
    if inputs.get("pixel_values") is None:
        return {}
    sizes = picture_sizes(inputs["pixel_values"], model.config.vision_config.patch_size)
    return {"image": grids(sizes, each_patch)}


def _gemma3(model: Any, inputs: Mapping[str, Any]) -> dict[str, Layout]:
    if inputs.get("pixel_values") is None:
        return {}
    size = model.model.multi_modal_projector.kernel_size

    def pooled(h: int, w: int) -> Tensor:
        number = torch.arange(h * w, dtype=torch.float64).view(1, 1, h, w)
        return torch.nn.functional.unfold(number, size, stride=size)[0].T.long()

    sizes = picture_sizes(inputs["pixel_values"], model.config.vision_config.patch_size)
    return {"image": grids(sizes, pooled)}


def _projector(model: Any) -> Any:
    return model.model.multi_modal_projector


def _pool(model: Any) -> int:
    return model.model.multi_modal_projector.kernel_size**2


PALIGEMMA = Family(
    "paligemma",
    blocks_of,
    prefix_of,
    layout=_paligemma,
    projector=_projector,
    position_offset=1,
    bidirectional=True,
    joins=_projector,
)
GEMMA3 = Family(
    "gemma3", blocks_of, prefix_of, layout=_gemma3, merge=_pool, bidirectional=True, joins=_projector
)
