"""Llava: one grid a picture, a projector that works token by token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from secateur.families.vlm.facts import Family, Layout, each_patch, grids, picture_sizes
from secateur.families.vlm.towers import tower_family


def prefix_of(tower: Any) -> int:
    """Tokens before the patches; 0 in a tower that isn't known."""
    family = tower_family(tower)
    return family.prefix(tower) if isinstance(family, Family) else 0


def blocks_of(tower: Any) -> Any:
    """The blocks of a tower. Raises `AttributeError` where it isn't known."""
    family = tower_family(tower)
    if isinstance(family, Family):
        return family.blocks(tower)
    raise AttributeError(family or type(tower).__name__)


def feature_block(model: Any) -> int:
    """The (last) block whose output is projected."""
    layer = model.config.vision_feature_layer
    return layer if isinstance(layer, int) else layer[-1]


def layout(model: Any, inputs: Mapping[str, Any]) -> dict[str, Layout]:
    """One grid a picture; CLS counts as a visual token where the model keeps it."""
    if inputs.get("pixel_values") is None:
        return {}
    full = model.config.vision_feature_select_strategy == "full"
    lead = prefix_of(model.get_encoder("image")) if full else 0
    sizes = picture_sizes(inputs["pixel_values"], model.config.vision_config.patch_size)
    return {"image": grids(sizes, each_patch, lead=lead)}


def projector(model: Any) -> Any:
    """The projector; None where it takes the outputs of several blocks."""
    single = isinstance(model.config.vision_feature_layer, int)
    return model.model.multi_modal_projector if single else None


def joins(model: Any) -> Any:
    """The projector, crop by crop."""
    return model.model.multi_modal_projector


LLAVA = Family(
    "llava",
    blocks_of,
    prefix_of,
    layout=layout,
    feature_block=feature_block,
    projector=projector,
    joins=joins,
)
