"""InternVL, Idefics3, SmolVLM: a pixel shuffle joins square groups of patches; the model's own says which."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from secateur.families.vlm.facts import Family, Layout, grids, picture_sizes
from secateur.families.vlm.llava import blocks_of, feature_block, joins, prefix_of


def _internvl(model: Any, inputs: Mapping[str, Any]) -> dict[str, Layout]:
    pixels = inputs.get("pixel_values")
    if pixels is None:
        return {}
    config = model.config.vision_config
    patch = config.patch_size[0] if isinstance(config.patch_size, list | tuple) else config.patch_size

    def shuffle(h: int, w: int) -> Tensor:
        number = torch.arange(h * w, dtype=torch.float64).view(1, h, w, 1)
        shuffled = model.model.pixel_shuffle(number, scale_factor=model.config.downsample_ratio)
        return shuffled.flatten(0, 2).long()

    return {"image": grids(picture_sizes(pixels, patch), shuffle)}


def _idefics(model: Any, inputs: Mapping[str, Any]) -> dict[str, Layout]:
    pixels = inputs.get("pixel_values")
    if pixels is None:
        return {}
    # crops of zeros are padding, and the model drops them
    real = (pixels.flatten(2) != 0).any(-1).flatten()
    connector = model.model.connector

    def shuffle(h: int, w: int) -> Tensor:
        number = torch.arange(h * w, dtype=torch.float64).view(1, h * w, 1)
        return connector.pixel_shuffle(number, connector.scale_factor).flatten(0, 1).long()

    sizes = picture_sizes(pixels.flatten(0, 1)[real], model.config.vision_config.patch_size)
    return {"image": grids(sizes, shuffle)}


def _ratio(model: Any) -> int:
    return round(model.config.downsample_ratio**-2)


def _scale(model: Any) -> int:
    return model.config.scale_factor**2


INTERNVL = Family(
    "internvl",
    blocks_of,
    prefix_of,
    layout=_internvl,
    merge=_ratio,
    feature_block=feature_block,
    masks=False,
    joins=joins,
)
IDEFICS3 = Family(
    "idefics3",
    blocks_of,
    prefix_of,
    layout=_idefics,
    merge=_scale,
    joins=lambda model: model.model.connector,
)
