"""Vision-language models and vision transformers, a small file a family: facts that running the model cannot tell."""

from __future__ import annotations

import dataclasses
from typing import Any

from secateur.errors import SecateurError, choose
from secateur.families.vlm.anyres import ANYRES
from secateur.families.vlm.derived import derive, refusal, sees_and_writes
from secateur.families.vlm.facts import Facts, Family, Layout, decoder_of
from secateur.families.vlm.gemma import GEMMA3, PALIGEMMA
from secateur.families.vlm.llava import LLAVA
from secateur.families.vlm.qwen import QWEN2, QWEN2_5, QWEN3
from secateur.families.vlm.shuffled import IDEFICS3, INTERNVL
from secateur.families.vlm.towers import tower_family

__all__ = ["Facts", "Family", "Layout", "facts_of", "family_of", "register_family"]

VLMS: dict[str, Family] = {
    "llava": LLAVA,
    "llava_next": ANYRES,
    "llava_onevision": ANYRES,
    "qwen2_vl": QWEN2,
    "qwen2_5_vl": QWEN2_5,
    "qwen3_vl": QWEN3,
    "internvl": INTERNVL,
    "idefics3": IDEFICS3,
    "smolvlm": IDEFICS3,
    "paligemma": PALIGEMMA,
    "gemma3": GEMMA3,
}


def register_family(model_type: str, like: str, **changes: Any) -> Family:
    """Lets token methods work on a family of models that secateur doesn't know, and returns what is known of it now.

    >>> register_family("my_vlm", like="llava").name
    'my_vlm'
    >>> del VLMS["my_vlm"]

    The first inputs with pictures are run with every token kept, and with half of them dropped or hidden; other states are an error.

    Args:
        model_type: as the model's config says it.
        like: the known family whose parts are found in the same way.
        **changes: fields of `Family` that differ, such as `layout`, `merge` or `first_layer`.

    Raises:
        SecateurError: the name is taken, or there is no such family or field.
    """
    if model_type in VLMS:
        raise SecateurError(f"there is a family {model_type!r} already", where="register_family")
    choose(like, VLMS, what="family", where="register_family", near=1)
    fields = [f.name for f in dataclasses.fields(Family) if f.name not in ("name", "proven")]
    for name in changes:
        choose(name, fields, what="field", where="register_family", near=1)
    VLMS[model_type] = dataclasses.replace(VLMS[like], name=model_type, proven=False, **changes)
    return VLMS[model_type]


def family_of(model: Any) -> Family:
    """The family of a model.

    Raises `SecateurError` with the reason where tokens cannot leave it.
    """
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if isinstance(kind, str) and kind in VLMS and hasattr(model, "get_image_features"):
        family = VLMS[kind]
        if not hasattr(model, "generate"):
            raise SecateurError(
                f"{type(model).__name__} has no language head",
                where="attach",
                fix="give the model that generates, not its base",
            )
        return family
    tower = tower_family(model)
    if isinstance(tower, Family):
        return tower
    name = kind or type(model).__name__
    if tower is not None:
        raise SecateurError(f"tokens cannot leave {name}: {tower}", where="attach")
    if sees_and_writes(model):
        reason = refusal(model)
        if reason is None:
            return derive(model)
        raise SecateurError(f"tokens cannot leave {name}: {reason}", where="attach")
    raise SecateurError(
        f"{name} isn't a vision-language model or vision transformer that secateur knows",
        where="attach",
        fix=f"register_family, or one that it knows: {', '.join(VLMS)} and ViT, CLIP, SigLIP, DINOv2, DINOv3, timm VisionTransformer and Eva",
    )


def _number(config: Any, *names: str, default: int = 0) -> int:
    for name in names:
        value = getattr(config, name, None)
        if isinstance(value, int | float):
            return int(value)
    return default


def facts_of(model: Any, family: Family) -> Facts:
    """Depths and widths, from the model's config and modules."""
    plain = family.layout is None
    tower = model if plain else model.get_encoder("image")
    try:
        blocks: Any = family.blocks(tower)
    except AttributeError:
        blocks = None
    vision: dict[str, Any] = {"blocks": len(blocks) if blocks is not None else 0}
    config = getattr(tower, "config", None)
    if config is not None:
        width = _number(config, "embed_dim", "hidden_size")
        ratio = getattr(config, "mlp_ratio", None)
        vision["vision_hidden"] = width
        vision["vision_heads"] = _number(config, "num_attention_heads", "num_heads", default=1)
        vision["vision_intermediate"] = _number(
            config, "intermediate_size", default=int(width * (ratio or 4))
        )
    elif blocks is not None:
        vision["vision_hidden"] = int(tower.embed_dim)
        vision["vision_heads"] = int(blocks[0].attn.num_heads)
        mlp = blocks[0].mlp
        vision["vision_intermediate"] = int(mlp.fc2.in_features)
    if blocks is not None and len(blocks):
        mlp = blocks[0].mlp
        vision["vision_gated"] = any(hasattr(mlp, n) for n in ("gate_proj", "fc1_g", "w12"))
    prefix = family.prefix(tower)
    vision["prefix"], vision["has_cls"] = prefix, prefix > 0
    if plain:
        return Facts(**vision)
    text = model.config.get_text_config()
    heads = _number(text, "num_attention_heads", "num_heads", "n_head", default=1)
    hidden = _number(text, "hidden_size", "d_model", "n_embd")
    decoder = decoder_of(model)
    return Facts(
        layers=len(decoder.layers),
        feature_block=family.feature_block(model),
        merge=family.merge(model),
        hidden=hidden,
        intermediate=_number(text, "intermediate_size", "ffn_dim", "n_inner"),
        heads=heads,
        kv_heads=_number(text, "num_key_value_heads", default=heads),
        head_dim=_number(text, "head_dim", default=hidden // heads),
        gated=hasattr(getattr(decoder.layers[0], "mlp", None), "gate_proj"),
        tokenwise_projector=family.projector(model) is not None,
        mrope=family.mrope,
        first_layer=family.first_layer(model),
        video=family.video,
        **vision,
    )
