"""Tiny random models for checks: two built-in ones, a network of convolutions, and a small one of any transformers class.

Weights are large enough that a dropped token or a wrong mask moves the outputs, and double precision tells that from rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import SecateurError
from secateur.families.vlm import family_of

WIDTH, INNER, DEPTH, HEADS, WORDS, SIDE, PATCH = 32, 48, 4, 4, 128, 16, 4
HEAD = WIDTH // HEADS
SECTIONS = [1, 1, 2]
"""Of half a head, for rotary positions in three axes."""
FIRST_WORD = 64
"""Ids below are for special tokens."""
PAD = 0

SMALL = {
    **dict.fromkeys(
        [
            "hidden_size",
            "d_model",
            "n_embd",
            "dim",
            "embed_dim",
            "embedding_size",
            "out_hidden_size",
            "projection_dim",
            "word_embed_proj_dim",
            "text_hidden_size",
            "encoder_hidden_size",
            "adapter_in_dim",
            "adapter_out_dim",
            "adapter_hidden_size",
            "projection_hidden_dim",
            "projector_hidden_dim",
            "mlp_dim",
        ],
        WIDTH,
    ),
    **dict.fromkeys(
        [
            "intermediate_size",
            "ffn_dim",
            "n_inner",
            "d_ff",
            "encoder_ffn_dim",
            "decoder_ffn_dim",
            "moe_intermediate_size",
            "shared_expert_intermediate_size",
        ],
        INNER,
    ),
    **dict.fromkeys(
        [
            "num_hidden_layers",
            "n_layer",
            "n_layers",
            "num_layers",
            "encoder_layers",
            "decoder_layers",
            "num_decoder_layers",
            "depth",
        ],
        DEPTH,
    ),
    **dict.fromkeys(
        [
            "num_attention_heads",
            "n_head",
            "n_heads",
            "num_heads",
            "encoder_attention_heads",
            "decoder_attention_heads",
            "num_local_experts",
            "num_experts",
            "n_routed_experts",
            "moe_num_experts",
            "num_query_tokens",
            "linear_num_heads",
            "linear_num_key_heads",
            "linear_num_value_heads",
            "index_n_heads",
            "swa_num_attention_heads",
            "swa_num_key_value_heads",
            "num_sliding_attention_heads",
        ],
        HEADS,
    ),
    **dict.fromkeys(
        [
            "head_dim",
            "d_kv",
            "qk_rope_head_dim",
            "qk_nope_head_dim",
            "v_head_dim",
            "query_pre_attn_scalar",
            "linear_head_dim",
            "linear_key_head_dim",
            "linear_value_head_dim",
            "index_head_dim",
            "swa_head_dim",
            "hidden_size_per_layer_input",
            "laurel_rank",
        ],
        HEAD,
    ),
    **dict.fromkeys(["q_lora_rank", "kv_lora_rank"], 2 * HEAD),
    **dict.fromkeys(["num_experts_per_tok", "moe_topk", "moe_k", "scale_factor"], 2),
    **dict.fromkeys(["n_group", "topk_group", "first_k_dense_replace", "n_shared_experts"], 1),
    "vocab_size": WORDS,
    "vocab_size_per_layer_input": WORDS,
    "image_size": SIDE,
    "patch_size": PATCH,
    "num_position_embeddings": (SIDE // PATCH) ** 2 * 4,
    "position_embedding_size": (SIDE // PATCH) ** 2 * 4,
    "mm_tokens_per_image": 4,
    "hidden_sizes": WIDTH,
    "depths": 2,
}
"""The most that stays of these fields of a config, whatever model it is of; all others are kept as they are."""
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth")
UNWANTED = (
    "quantization_config",
    "auto_map",
    "_name_or_path",
    "dtype",
    "torch_dtype",
    "transformers_version",
)


def shrink(config: Any, **changes: Any) -> Any:
    """A config of the same class: few layers, small widths and vocabulary; kinds of layer, positions and switches as they were.

    >>> shrink(transformers.LlamaConfig()).hidden_size  # doctest: +SKIP
    32

    `changes` are laid over the small fields, those of configs in it by dicts. Special tokens get new numbers. Raises what the config's own class raises where the small sizes don't fit together.
    """
    fields = {name: value for name, value in config.to_dict().items() if name not in UNWANTED}
    ids = sorted({i for _, value in _special(fields) for i in value if i >= 0})
    if len(ids) >= FIRST_WORD:
        raise SecateurError(f"{len(ids)} special tokens are too many for a tiny vocabulary", where="shrink")
    new = _smaller(fields, {old: new for new, old in enumerate(ids, 1)})
    if "spatial_merge_size" in (new.get("vision_config") or ()) and new["text_config"].get("rope_parameters"):
        # positions in three axes; where a config doesn't divide them, its class assumes heads of 128
        new["text_config"]["rope_parameters"]["mrope_section"] = SECTIONS
    return type(config).from_dict(_laid_over(new, changes))


def _laid_over(fields: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    new = dict(fields)
    for name, value in changes.items():
        inner = isinstance(value, Mapping) and isinstance(new.get(name), Mapping)
        new[name] = _laid_over(new[name], value) if inner else value
    return new


def _special(fields: Mapping[str, Any]) -> Iterator[tuple[str, list[int]]]:
    """The fields that name special tokens, of a config and of the configs in it."""
    for name, value in fields.items():
        if isinstance(value, Mapping):
            yield from _special(value) if name.endswith("_config") else ()
        elif name.endswith(("_id", "_token_index", "_token_ids")) and value is not None:
            yield name, [int(i) for i in (value if isinstance(value, list | tuple) else [value])]


def _smaller(fields: Mapping[str, Any], ids: Mapping[int, int]) -> dict[str, Any]:
    new: dict[str, Any] = {
        name: _smaller(value, ids)
        if isinstance(value, Mapping) and name.endswith("_config")
        else _capped(value, SMALL.get(name))
        for name, value in fields.items()
        if name not in UNWANTED
    }
    for name, old in _special({k: v for k, v in fields.items() if not isinstance(v, Mapping)}):
        mapped = [ids.get(i, i) for i in old]
        new[name] = mapped if isinstance(fields[name], list | tuple) else mapped[0]
    heads = fields.get("num_attention_heads") or fields.get("num_heads")
    groups = fields.get("num_key_value_heads")
    if isinstance(heads, int) and isinstance(groups, int):
        new["num_key_value_heads"] = min(groups, HEADS if groups == heads else HEADS // 2)
    deep = next((fields[name] for name in LAYERS if isinstance(fields.get(name), int)), 0)
    if deep > DEPTH:
        _fewer_layers(new, fields, deep)
    for name in ("rope_parameters", "rope_scaling"):
        if isinstance(fields.get(name), Mapping):
            new[name] = _rotary(fields[name], int(new.get("head_dim") or HEAD) // 2)
    for name in [name for name in fields if name.endswith(("_feature_layer", "_feature_layers"))]:
        layers = fields[name] if isinstance(fields[name], list | tuple) else [fields[name]]
        near = [max(-DEPTH, min(i, DEPTH - 1)) if isinstance(i, int) else i for i in layers]
        new[name] = near if isinstance(fields[name], list | tuple) else near[0]
    if "fullatt_block_indexes" in new:
        new["window_size"] = 4 * PATCH
    if "depths" in new and isinstance(new.get("image_size"), int):
        new["image_size"] = 4 * SIDE  # each stage halves it
    if "image_grid_pinpoints" in new:
        new["image_grid_pinpoints"] = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]
    return new


def _capped(value: Any, most: int | None) -> Any:
    if most is None or value is None or isinstance(value, bool):
        return value
    if isinstance(value, list | tuple):
        return [_capped(item, most) for item in value]
    return min(value, most) if isinstance(value, int | float) else value


def _fewer_layers(new: dict[str, Any], fields: Mapping[str, Any], deep: int) -> None:
    """Lists with an entry a layer lose the same layers, of which each kind keeps one; numbers of layers are drawn closer."""
    kinds = next((v for k, v in fields.items() if k.endswith("types") and _long(v, deep)), [0] * deep)
    stay = list(range(DEPTH))
    for kind in dict.fromkeys(map(str, kinds)):
        if kind not in {str(kinds[i]) for i in stay}:
            stay = sorted([*stay[:-1], [str(k) for k in kinds].index(kind)])
    for name, value in fields.items():
        if _long(value, deep):
            new[name] = [value[i] for i in stay]
        elif name == "per_layer_config" and value:
            inner = {
                int(i): {k: _capped(v, SMALL.get(k)) for k, v in each.items()} for i, each in value.items()
            }
            new[name] = {stay.index(i): each for i, each in inner.items() if i in stay}
        elif name == "fullatt_block_indexes":
            new[name] = [DEPTH // 2 - 1, DEPTH - 1]
        elif name == "deepstack_visual_indexes":
            new[name] = [DEPTH // 2 - 1]


def _long(value: Any, deep: int) -> bool:
    return isinstance(value, list | tuple) and len(value) == deep


def _rotary(rope: Mapping[str, Any], half: int) -> dict[str, Any]:
    """Rotary settings for heads of 2 * `half`."""
    new: dict[str, Any] = {}
    for name, value in rope.items():
        if isinstance(value, Mapping):
            value = _rotary(value, half)
        elif name == "mrope_section":
            value = SECTIONS
        elif name.endswith("_factor") and isinstance(value, list | tuple):
            value = value[: int(half * rope.get("partial_rotary_factor", 1))]
        new[name] = value
    return new


def fill(model: nn.Module, seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Module:
    """The model with random matrices, for evaluation."""
    model = model.to(dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() >= 2:
                scale = 0.5 if "embed" in name else 0.5 / p[0].numel() ** 0.5
                p.copy_(torch.randn(p.shape, generator=generator) * scale)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.eos_token_id = None  # type: ignore[union-attr]
        model.generation_config.pad_token_id = PAD  # type: ignore[union-attr]
    return model.eval()


def tiny_llama() -> nn.Module:
    """A Llama of four layers, 4 query heads on 2 key/value heads."""
    import transformers

    return fill(transformers.LlamaForCausalLM(transformers.LlamaConfig(**_text(), tie_word_embeddings=False)))


def tiny_mixtral() -> nn.Module:
    """A Mixtral of eight experts, stacked in tensors, of which a token is sent to two."""
    import transformers

    config = transformers.MixtralConfig(
        **_text(), num_local_experts=8, num_experts_per_tok=2, tie_word_embeddings=False
    )
    return fill(transformers.MixtralForCausalLM(config))


def tiny_llava() -> nn.Module:
    """CLIP (4 x 4 patches and a CLS token) and Llama."""
    import transformers

    vision = transformers.CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=DEPTH,
        num_attention_heads=HEADS,
        image_size=SIDE,
        patch_size=PATCH,
    )
    config = transformers.LlavaConfig(
        vision_config=vision,
        text_config=transformers.LlamaConfig(**_text()),
        image_token_index=5,
        tie_word_embeddings=False,
    )
    return fill(transformers.LlavaForConditionalGeneration(config))


def tiny_qwen() -> nn.Module:
    """Qwen2.5-VL: packed pictures, windows in the tower, rotary positions in three axes."""
    import transformers

    vision = {
        "depth": DEPTH,
        "hidden_size": WIDTH,
        "intermediate_size": INNER,
        "num_heads": HEADS,
        "patch_size": PATCH,
        "temporal_patch_size": 1,
        "window_size": 4 * PATCH,
        "fullatt_block_indexes": [1, 3],
        "out_hidden_size": WIDTH,
    }
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": SECTIONS}
    config = transformers.Qwen2_5_VLConfig(
        text_config={**_text(), "rope_parameters": rope},
        vision_config=vision,
        image_token_id=5,
        video_token_id=6,
        vision_start_token_id=7,
        vision_end_token_id=8,
        tie_word_embeddings=False,
    )
    return fill(transformers.Qwen2_5_VLForConditionalGeneration(config))


def _text() -> dict[str, Any]:
    return {
        "hidden_size": WIDTH,
        "intermediate_size": INNER,
        "num_hidden_layers": DEPTH,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS // 2,
        "vocab_size": WORDS,
        "pad_token_id": PAD,
        "bos_token_id": 1,
        "eos_token_id": None,
        "max_position_embeddings": 512,
    }


class TinyCnn(nn.Module):
    """A stem, a residual block whose channels are coupled, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.first, self.second = nn.Conv2d(8, 16, 3, padding=1), nn.Conv2d(16, 8, 3, padding=1)
        self.down, self.head = nn.Conv2d(8, 12, 3, stride=2), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        x = x + self.second(self.first(x).relu())
        return self.head(self.down(x).relu().mean((2, 3)))


def tiny_cnn() -> nn.Module:
    return fill(TinyCnn())


def inputs_for(model: Any) -> Any:
    """Example inputs of a model that takes text or pictures alone; of a vision-language model what its processor would give.

    The latter: three rows with two, one and no pictures, padded on the left.
    """
    generator = torch.Generator().manual_seed(0)
    config = getattr(model, "config", None)
    kind = next(model.parameters()).dtype
    if sees(model):
        return _questions(model, generator)
    if getattr(model, "main_input_name", "input_ids") == "pixel_values" or isinstance(model, TinyCnn):
        side = getattr(config, "image_size", None) or 2 * SIDE
        sides = side if isinstance(side, list | tuple) else (side, side)
        noise = torch.randn(2, getattr(config, "num_channels", 3), *sides, generator=generator).to(kind)
        return noise if config is None else {"pixel_values": noise}
    return text_for(model)


def sees(model: Any) -> bool:
    """Whether it is a vision-language model."""
    vision = getattr(getattr(model, "config", None), "vision_config", None)
    return vision is not None and hasattr(model, "get_image_features")


def text_for(model: Any) -> dict[str, Tensor]:
    """Token ids of two rows, from the upper half of the vocabulary."""
    config, generator = model.config, torch.Generator().manual_seed(0)
    vocabulary = config.get_text_config().vocab_size
    ids = torch.randint(vocabulary // 2, vocabulary, (2, 12), generator=generator)
    made = {"input_ids": ids}
    if getattr(config, "is_encoder_decoder", False):
        made["decoder_input_ids"] = ids[:, :8]
    return made


def _questions(model: Any, generator: torch.Generator) -> dict[str, Tensor]:
    family, config = family_of(model), model.config
    if family.measure is not None:
        raise SecateurError(
            f"in what form {config.model_type} takes pictures isn't known; attach proves it on its first inputs",
            where="inputs",
        )
    rows = (2, 1, 0)
    made = _pictures(model, rows, generator)
    if family.layout is None:
        raise SecateurError(f"{type(model).__name__} has no language model", where="inputs")
    counts = family.layout(model, made)["image"].image.bincount().tolist()
    sequences, start = [], 0
    for row, pictures in enumerate(rows):
        ids = [FIRST_WORD, FIRST_WORD + 1 + row]
        for count in counts[start : start + pictures]:
            ids += [getattr(config, "vision_start_token_id", None) or FIRST_WORD + 9]
            ids += [config.image_token_id] * count + [FIRST_WORD + 10]
        start += pictures
        sequences.append(ids + torch.randint(FIRST_WORD, WORDS, (4 + row,), generator=generator).tolist())
    width = max(map(len, sequences))
    given: dict[str, Tensor] = {
        "input_ids": torch.tensor([[PAD] * (width - len(ids)) + ids for ids in sequences]),
        "attention_mask": torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in sequences]),
        **made,
    }
    pictured = (given["input_ids"] == config.image_token_id).long()
    if family.mrope:
        given["mm_token_type_ids"] = pictured
    elif family.bidirectional:
        # a prefix sees itself whole; elsewhere each picture does
        given["token_type_ids"] = torch.zeros_like(pictured) if family.position_offset else pictured
    return given


def _pictures(model: Any, rows: tuple[int, ...], generator: torch.Generator) -> dict[str, Tensor]:
    """Noise in the form that the model's own processor gives pictures."""
    config, vision = model.config, model.config.vision_config
    kind = next(model.parameters()).dtype
    side = vision.image_size if hasattr(vision, "image_size") else SIDE
    side = side[0] if isinstance(side, list | tuple) else side
    count = sum(rows)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(kind)

    if family_of(model).packed:
        merge = vision.spatial_merge_size
        grid = torch.tensor([(1, 2 * merge, 3 * merge), (1, 2 * merge, 2 * merge), (1, 3 * merge, 2 * merge)])
        channels = getattr(vision, "in_channels", None) or getattr(vision, "in_chans", 3)
        width = channels * vision.temporal_patch_size * vision.patch_size**2
        return {"pixel_values": noise(int(grid.prod(1).sum()), width), "image_grid_thw": grid}
    if hasattr(config, "image_grid_pinpoints"):
        sizes = [(side, 2 * side - 2), (2 * side, side), (2 * side - 2, 2 * side)]
        return {"pixel_values": noise(count, 5, 3, side, side), "image_sizes": torch.tensor(sizes)}
    if hasattr(config, "scale_factor"):
        pixels = noise(len(rows), max(rows), 3, side, side)
        for row, pictures in enumerate(rows):
            pixels[row, pictures:] = 0
        return {"pixel_values": pixels}
    return {"pixel_values": noise(count, 3, side, side)}
