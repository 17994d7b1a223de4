"""Vision transformers: where their blocks are and how many tokens stand before the patches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from secateur.families.vlm.facts import Family


def _layers(*paths: str) -> Callable[[nn.Module], nn.ModuleList]:
    def find(tower: nn.Module) -> nn.ModuleList:
        for path in paths:
            try:
                blocks = tower.get_submodule(path)
            except AttributeError:
                continue
            if isinstance(blocks, nn.ModuleList | nn.Sequential):
                return blocks  # type: ignore[return-value]
        raise AttributeError(f"none of {', '.join(paths)}")

    return find


def _with_cls(tower: nn.Module) -> int:
    return 1


def _with_registers(tower: Any) -> int:
    return 1 + tower.config.num_register_tokens


def _bare(tower: nn.Module) -> int:
    return 0


def _timm_prefix(tower: Any) -> int:
    return tower.num_prefix_tokens


TOWERS: dict[str, Family] = {
    "vit": Family("vit", _layers("layers", "encoder.layer", "vit.layers"), _with_cls),
    "clip_vision_model": Family(
        "clip_vision_model", _layers("encoder.layers", "vision_model.encoder.layers"), _with_cls
    ),
    "siglip_vision_model": Family(
        "siglip_vision_model", _layers("encoder.layers", "vision_model.encoder.layers"), _bare, pools=True
    ),
    "dinov2": Family("dinov2", _layers("encoder.layer"), _with_cls),
    "dinov2_with_registers": Family("dinov2_with_registers", _layers("encoder.layer"), _with_registers),
    "dinov3_vit": Family("dinov3_vit", _layers("model.layer", "layer"), _with_registers, masks=False),
    "internvl_vision": Family("internvl_vision", _layers("encoder.layer"), _with_cls, masks=False),
    "idefics3_vision": Family("idefics3_vision", _layers("encoder.layers"), _bare),
    "smolvlm_vision": Family("smolvlm_vision", _layers("encoder.layers"), _bare),
    "timm": Family("timm", _layers("blocks"), _timm_prefix, pools=True),
}
TIMM = {"VisionTransformer", "Eva"}
REFUSED = {
    "swin": "its windows need every token of the picture",
    "swinv2": "its windows need every token of the picture",
    "SwinTransformer": "its windows need every token of the picture",
    "SwinTransformerV2": "its windows need every token of the picture",
    "hiera": "its pooling needs the whole grid",
    "Hiera": "its pooling needs the whole grid",
    "HieraModel": "its pooling needs the whole grid",
    "pixtral": "it packs pictures of any size behind a block-diagonal mask",
}


def tower_family(tower: Any) -> Family | str | None:
    """The family of a tower; the reason where it can't drop tokens; None where it isn't known."""
    cls = type(tower).__name__
    kind = getattr(getattr(tower, "config", None), "model_type", None)
    for name in (kind, cls):
        if name in REFUSED:
            return REFUSED[name]
    if cls in TIMM:
        return TOWERS["timm"]
    return TOWERS.get(kind) if isinstance(kind, str) else None
