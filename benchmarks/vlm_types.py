"""Every image-text-to-text type of transformers, tiny and random: what token methods can do with it, and whether that is exact.

    python benchmarks/vlm_types.py --out benchmarks/vlm_types.csv     # all types
    python benchmarks/vlm_types.py llava qwen2_vl                     # some, printed
    python benchmarks/vlm_types.py --summary benchmarks/vlm_types.csv # how many

Columns: `built` from a tiny config in double precision; `family`: known by a file or derived; `keep_all`: attached with every
token kept, generation gives the same logits to the last bit; `input`, `layer` and `encoder`: dropping there equals a run
of the untouched model without cache, in which every token stays in place and the dropped ones are hidden from attention
(1e-6, of the largest logit where that is above 1; 1e-4 for one type whose scans run in single precision), over three generated tokens, for three left-padded rows with two, one and no pictures that lose different numbers.
Layers that keep a state in place of keys have no such masks; where there are some behind the stage, the reference hands all
of them the shorter sequence. `places`: where tokens lie on a picture is told by a file (`file`), by the inputs' grids
(`grid`; changed patches move the tokens there most), or by nothing (`unknown`). `reason`: what was refused or went wrong.
"""

from __future__ import annotations

import argparse
import csv
import inspect
import os
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

import secateur
from secateur.errors import SecateurError
from secateur.families.vlm import VLMS, family_of
from secateur.families.vlm.facts import decoder_of, encoder_of, parts_of, placeholder
from secateur.tasks.tiny import fill, shrink

FIELDS = [
    "type",
    "built",
    "family",
    "keep_all",
    "input",
    "layer",
    "places",
    "seconds",
    "transformers",
    "reason",
]
ROWS = (2, 1, 0)
STEPS = 3
MOST = 40_000_000
"""Parameters of a tiny model, at most."""
PAD, BEGIN, WORD = 0, 60, 70
TYPES = ("mm_token_type_ids", "token_type_ids")
PREFIXED = {"paligemma"}
ROUGH = {"nemotron_h_omni": 1e-4}
"""Types whose scans of states run in single precision whatever the model's own."""
Changes = dict[str, Any]

PAIRS = {"<image>": 40, "<|extra_200|>": 41, "<|visual token 000000|>": 42, "IMGIMGAZ": 43, "IMGIMGBZ": 44}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
GEMMA_VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 4,
    "head_dim": 8, "pooling_kernel_size": 2, "patch_size": 4, "position_embedding_size": 64,
}  # fmt: skip
SIGHT = {"model_type": "gemma4_vision", **GEMMA_VISION}
SPEECH = {
    "audio_token_id": 52,
    "audio_start_token_id": 53,
    "vision_start_token_id": 54,
    "vision_end_token_id": 55,
}
CHANGES: dict[str, Changes] = {
    "apertus1p5": {
        "image_token_id": 40, "audio_token_id": 41, "image_token_offset": 100, "audio_token_offset": 116,
        "audio_config": {"codebook_dim": 32, "hidden_size": 32, "num_filters": 2, "codebook_size": 8,
                         "decoder_hidden_size": 32, "decoder_intermediate_size": 32},
        "vision_config": {"codebook_size": 16, "base_channels": 32, "latent_channels": 16, "embed_dim": 16, "num_res_blocks": 1},
    },
    "aria": {"projector_patch_to_query_dict": {"16": 8}},
    "blip-2": {"image_token_index": 50},
    "chameleon": {
        "vocabulary_map": PAIRS,
        "vq_config": {"resolution": 32, "base_channels": 32, "embed_dim": 16, "num_embeddings": 2, "latent_channels": 16},
    },
    "cohere_compass": {
        "text_config": {"rope_parameters": {"full_attention": {**ROPE, "mrope_section": [2, 1, 1]}}},
    },
    "deepseek_ocr2": {
        "text_config": {"mlp_layer_types": ["dense", "sparse", "sparse", "sparse"], "num_experts_per_tok": 2},
        "vision_config": {"sam_config": {"image_size": 64, "downsample_channels": [32, 32], "output_channels": 16,
                                         "global_attn_indexes": [1]}},
    },
    "diffusion_gemma": {"vision_config": SIGHT, "text_config": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 16}},
    "dots3_note": {"text_config": {"per_layer_config": None, "head_dim": 16}, "audio_config": {"adapter_input_size": 32, "conv_output_size": 32}, "vision_config": {"per_layer_config": None}},
    "emu3": {"vocabulary_map": {**PAIRS, **{f"<|visual token {i:06d}|>": 42 + i for i in range(8)}}, "vq_config": {"base_channels": 32, "codebook_size": 8, "hidden_size": 128}},
    "exaone4_5": {"text_config": {"sliding_window": 512}},
    "fast_vlm": {"vision_config": {"architecture": "fastvit_t8", "hidden_size": 768}},
    "gemma3n": {"text_config": {"num_kv_shared_layers": 0}},
    "gemma4": {"vision_config": SIGHT},
    "gemma4_unified": {"vision_config": {**SIGHT, "model_type": "gemma4_unified_vision"}},
    "glm4v_moe": {"text_config": {"rope_parameters": {"partial_rotary_factor": 1.0}}},
    "got_ocr2": {"vision_config": {"image_size": 64}},
    "granite4_vision": {
        "downsample_rate": "1/2", "deepstack_layer_map": [[-2, 0], [-1, 1]], "spatial_target_layers": [1, 2],
        "qformer_config": {"hidden_size": 32, "encoder_hidden_size": 32},
    },
    "hunyuan_vl": {"text_config": {"head_dim": 8}},
    "inkling2": {"text_config": {"unpadded_vocab_size": 128}},
    "inkling2_loop": {"text_config": {"unpadded_vocab_size": 128}},
    "inkling_mm_model": {"text_config": {"unpadded_vocab_size": 128}, "vision_config": {"num_hidden_layers": 3}},
    "instructblip": {"image_token_index": 50},
    "janus": {"vq_config": {"base_channels": 32, "latent_channels": 32, "num_patches": 4}},
    "kimi_k25": {"projection_hidden_size": 32},
    "llama4": {"vision_config": {"projector_input_dim": 32, "projector_output_dim": 32, "vision_output_dim": 32,
                                 "intermediate_size": 128}},
    "minicpm_ocr": {"image_token_id": 50},
    "minicpmv4_6": {"image_token_id": 50},
    "minicpmv4_7": {"image_token_id": 50},
    "molmo2": {"adapter_config": {"vision_feature_layer": [3, 2]}, "vision_config": {"num_position_embeddings": 16}},
    "muse_glimmer": {"projector_hidden_size": 32, "out_hidden_size": 128},
    "muse_spark": {"projector_hidden_size": 32, "out_hidden_size": 128},
    "nemotron_h_omni": {"projector_hidden_size": 32, "vision_hidden_size": 32, "image_token_id": 50},
    "perception_lm": {
        "vision_config": {"architecture": "vit_tiny_patch16_224", "model_args": {
            "embed_dim": 32, "depth": 2, "num_heads": 4, "img_size": 16, "patch_size": 4, "global_pool": ""}},
        "vision_use_cls_token": True,
    },
    "pp_chart2table": {"vision_config": {"image_size": 64}},
    "qwen2_5_omni_thinker": SPEECH,
    "qwen3_omni_moe_thinker": SPEECH,
    "qwen4_exp": {"text_config": {
        "indexer_budget": 256, "indexer_compress_ratio": 4, "indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 8,
        "ngram_vocab_size_base": 64, "hc_lowrank": 8}},
    "step3p7": {"text_config": {"sliding_window": 512}},
    "unlimited_ocr": {"vision_config": {"sam_config": {"image_size": 64, "downsample_channels": [32, 32]}}},
}  # fmt: skip
"""What a tiny config needs beside smaller sizes."""


def types() -> list[str]:
    """The types of the installed transformers."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    return list(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)


def model_of(kind: str) -> Any:
    """A tiny random model of a type."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as NAMES

    cls = getattr(transformers, NAMES[kind])
    config = shrink(cls.config_class(), **CHANGES.get(kind, {}))
    with torch.device("meta"):
        size = sum(p.numel() for p in cls(config).parameters())
    if size > MOST:
        raise ValueError(f"the tiny config still makes {size} parameters")
    torch.manual_seed(0)
    model = cls(config)
    # the grouped matrix product knows no double precision
    model.set_experts_implementation("eager")
    return fill(model)


def _first(config: Any, *names: str, default: int) -> int:
    for name in names:
        value = getattr(config, name, None)
        if isinstance(value, list | tuple):
            value = value[0]
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    return default


def packed(
    model: Any, noise: Callable[..., Tensor], merge: int = 0, shape: tuple[int, ...] = ()
) -> dict[str, Tensor]:
    """Patches of all pictures in one list."""
    vision = model.config.vision_config
    merge = merge or _first(vision, "spatial_merge_size", "merge_size", default=2)
    grid = torch.tensor([(1, 2 * merge, 3 * merge), (1, 2 * merge, 2 * merge), (1, 3 * merge, 2 * merge)])
    channels = _first(vision, "in_channels", "in_chans", "num_channels", default=3)
    width = channels * _first(vision, "temporal_patch_size", default=1)
    width *= _first(vision, "patch_size", default=4) ** 2
    return {
        "pixel_values": noise(int(grid.prod(1).sum()), *(shape or (width,))),
        "image_grid_thw": grid,
    }


def tiles(model: Any, noise: Callable[..., Tensor]) -> dict[str, Tensor]:
    """A base crop and tiles for each picture."""
    side = _first(model.config.vision_config, "image_size", default=16)
    sizes = torch.tensor([(side, 2 * side - 2), (2 * side, side), (2 * side - 2, 2 * side)])
    return {"pixel_values": noise(3, 5, 3, side, side), "image_sizes": sizes}


def by_row(model: Any, noise: Callable[..., Tensor]) -> dict[str, Tensor]:
    """[rows, most pictures of a row, 3, side, side]; pictures of zeros are padding."""
    side = _first(model.config.vision_config, "image_size", default=16)
    pixels = noise(len(ROWS), max(ROWS), 3, side, side)
    for row, pictures in enumerate(ROWS):
        pixels[row, pictures:] = 0
    return {"pixel_values": pixels}


def pictures(model: Any, noise: Callable[..., Tensor]) -> dict[str, Tensor]:
    """[pictures, 3, side, side]."""
    side = _first(getattr(model.config, "vision_config", None), "image_size", default=16)
    return {"pixel_values": noise(sum(ROWS), 3, side, side)}


def whole_masks(model: Any, noise: Callable[..., Tensor]) -> dict[str, Tensor]:
    """Rows of tiles and which are real."""
    given = by_row(model, noise)
    return {**given, "pixel_attention_mask": (given["pixel_values"].flatten(2) != 0).any(-1)}


def placed(model: Any, noise: Callable[..., Tensor]) -> dict[str, Tensor]:
    """Patches of each picture with their place, padded at the end."""
    sides = [(4, 6), (4, 4), (6, 4)]
    most = max(h * w for h, w in sides)
    place = torch.full((len(sides), most, 2), -1)
    for i, (h, w) in enumerate(sides):
        at = torch.arange(h * w)
        place[i, : h * w] = torch.stack([at % w, at // w], 1)
    width = 48 if model.config.model_type != "gemma4_unified" else 192
    return {"pixel_values": noise(len(sides), most, width), "image_position_ids": place}


def spatial(model: Any, noise: Callable[..., Tensor]) -> dict[str, Tensor]:
    """Patches of each picture, padded at the end, with its height and width."""
    sides = torch.tensor([(4, 6), (4, 4), (6, 4)])
    most = int(sides.prod(1).max())
    mask = (torch.arange(most) < sides.prod(1)[:, None]).long()
    patch = _first(model.config.vision_config, "patch_size", default=4)
    return {
        "pixel_values": noise(len(sides), most, 3 * patch**2),
        "spatial_shapes": sides,
        "pixel_attention_mask": mask,
    }


def sized(model: Any, noise: Callable[..., Tensor]) -> dict[str, Tensor]:
    """Pictures with their sizes in pixels."""
    given = pictures(model, noise)
    return {**given, "image_sizes": torch.tensor([given["pixel_values"].shape[-2:]] * sum(ROWS))}


def targets(model: Any, noise: Callable[..., Tensor]) -> dict[str, Tensor]:
    """Strips of patches, [1, 3, patch, patches of all pictures * patch], with heights and widths in patches."""
    sides = torch.tensor([(4, 8), (4, 4), (8, 4)])
    patch = _first(model.config.vision_config, "patch_size", default=4)
    return {"pixel_values": noise(1, 3, patch, int(sides.prod(1).sum()) * patch), "target_sizes": sides}


def heights_widths(model: Any, noise: Callable[..., Tensor]) -> dict[str, Tensor]:
    """Patches of all pictures in one list, with heights and widths."""
    given = packed(model, noise)
    return {"pixel_values": given["pixel_values"], "image_grid_hw": given["image_grid_thw"][:, 1:]}


def cells(model: Any, noise: Callable[..., Tensor]) -> dict[str, Tensor]:
    """Squares of 2 x 2 patches, channels last."""
    grid = torch.tensor([(1, 4, 6), (1, 4, 4), (1, 6, 4)])
    return {"pixel_values": noise(int(grid.prod(1).sum()), 8, 8, 3), "image_grid_thw": grid}


def pooled(model: Any, noise: Callable[..., Tensor]) -> dict[str, Tensor]:
    """Two views of each picture, each of 4 x 4 patches, and which patches each token pools."""
    index = torch.arange(16).view(4, 4)
    small = index.view(2, 2, 2, 2).transpose(1, 2).reshape(4, 4)
    views = torch.cat([small + 16 * view for view in range(6)])
    return {
        "pixel_values": noise(6, 16, 48),
        "image_token_pooling": views,
        "image_grids": torch.tensor([[2, 2, 2, 2]] * 3),
        "image_num_crops": torch.full((3,), 2),
    }


def _with(form: Callable[..., dict[str, Any]], **more: Callable[..., Any]) -> Callable[..., dict[str, Any]]:
    def made(model: Any, noise: Callable[..., Tensor]) -> dict[str, Any]:
        given = form(model, noise)
        return given | {name: value(given, noise) for name, value in more.items()}

    return made


PICTURES: dict[str, Callable[[Any, Callable[..., Tensor]], dict[str, Any]]] = {
    "apertus1p5": lambda m, n: {"pixel_values": n(3, 3, 32, 32), "image_sizes": torch.tensor([[32, 32]] * 3)},
    "chameleon": lambda m, n: {"pixel_values": n(3, 3, 32, 32)},
    "deepseek_ocr2": lambda m, n: {"pixel_values": n(3, 3, 64, 64)},
    "deepseek_vl_hybrid": _with(pictures, high_res_pixel_values=lambda given, n: n(3, 3, 16, 16)),
    "diffusion_gemma": placed,
    "emu3": lambda m, n: {"pixel_values": n(3, 3, 32, 32), "image_sizes": torch.tensor([[32, 32]] * 3)},
    "fast_vlm": lambda m, n: {"pixel_values": n(3, 3, 128, 128)},
    "fuyu": lambda m, n: {"pixel_values": n(3, 4, 48)},
    "gemma4": placed,
    "gemma4_unified": placed,
    "got_ocr2": lambda m, n: {"pixel_values": n(3, 3, 64, 64)},
    "granite_docling": whole_masks,
    "inkling2": cells,
    "inkling2_loop": cells,
    "inkling_mm_model": lambda m, n: {"pixel_values": n(12, 2, 4, 4, 3)},
    "instructblip": _with(pictures, qformer_input_ids=lambda given, n: torch.full((3, 4), 7)),
    "kimi_k25": lambda m, n: packed(m, n, shape=(3, 4, 4)),
    "lfm2_vl": spatial,
    "lighton_ocr": sized,
    "llama4": pictures,
    "minicpm_ocr": targets,
    "minicpmv4_6": targets,
    "minicpmv4_7": targets,
    "mistral3": sized,
    "mistral_large4": sized,
    "molmo2": pooled,
    "muse_glimmer": lambda m, n: packed(m, n, shape=(96,)),
    "muse_spark": lambda m, n: packed(m, n, shape=(96,)),
    "nemotron_h_omni": heights_widths,
    "paddleocr_vl": lambda m, n: packed(m, n, shape=(3, 4, 4)),
    "perception_lm": lambda m, n: {"pixel_values": n(3, 1, 3, 16, 16)},
    "pp_chart2table": lambda m, n: {"pixel_values": n(3, 3, 64, 64)},
    "step3p7": lambda m, n: {"pixel_values": n(3, 3, 64, 64)},
    "unlimited_ocr": lambda m, n: {"pixel_values": n(3, 3, 64, 64)},
    "video_llama_3": _with(packed, image_merge_sizes=lambda given, n: torch.full((3,), 2)),
}  # fmt: skip
"""Pictures of types whose encoder's arguments don't tell their form."""


def pictures_of(model: Any, kind: str) -> dict[str, Any]:
    """What the model's processor would make of three pictures, of noise."""
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    names = inspect.signature(encoder_of(model, "image").get_image_features).parameters
    if kind in PICTURES:
        return PICTURES[kind](model, noise)
    if "image_grid_thw" in names:
        return packed(model, noise)
    if getattr(model.config, "image_grid_pinpoints", None):
        return tiles(model, noise)
    if "pixel_attention_mask" in names:
        return by_row(model, noise)
    return pictures(model, noise)


def encoded(model: Any, given: Mapping[str, Any]) -> Any:
    """What the model's encoder gives for pictures."""
    function = encoder_of(model, "image").get_image_features
    names = inspect.signature(function).parameters
    with torch.no_grad():
        return function(**{k: v for k, v in given.items() if k in names}, return_dict=True)


def inputs_of(model: Any, kind: str) -> dict[str, Any]:
    """Three left-padded rows with two, one and no pictures, each a run of placeholders between two marks."""
    generator = torch.Generator().manual_seed(1)
    given = pictures_of(model, kind)
    counts = [len(part) for part in parts_of(encoded(model, given), sum(ROWS))]
    if set(counts) == {1} and len(counts) > sum(ROWS):
        counts = [len(counts) // sum(ROWS)] * sum(ROWS)
    if len(counts) != sum(ROWS):
        raise ValueError(f"{len(counts)} parts came for {sum(ROWS)} pictures")
    image = placeholder(model, "image")
    marks = ("vision_start_token_id", "image_start_token_id")
    start = next((value for name in marks if (value := getattr(model.config, name, None)) is not None), None)
    rows, at = [], 0
    for row, number in enumerate(ROWS):
        ids = [BEGIN, BEGIN + 1 + row]
        for count in counts[at : at + number]:
            ids += [start or WORD, *[image] * count, WORD + 1]
        at += number
        rows.append(ids + torch.randint(WORD + 2, 120, (4 + row,), generator=generator).tolist())
    width = max(map(len, rows))
    ids_ = torch.tensor([[PAD] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    names = inspect.signature(type(model).forward).parameters
    visual = (ids_ == image).long()
    # a prefix that sees itself whole is all of one type, and the words written after it of another
    types = {name: visual * (kind not in PREFIXED) for name in TYPES if name in names}
    return {"input_ids": ids_, "attention_mask": mask, **types, **given}


# -- references --


class Hidden(TorchFunctionMode):
    """Inside, attention doesn't see the key slots marked in `gone` [B, L]; each still sees itself."""

    def __init__(self, gone: Tensor):
        super().__init__()
        self.gone = gone
        self.used = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is not torch.nn.functional.scaled_dot_product_attention:
            return func(*args, **kwargs)
        self.used = True
        q, k, v = args[:3]
        length = k.shape[2]
        seen = ~self.gone[:, None, None, :] | torch.eye(length, dtype=torch.bool)
        if kwargs.pop("is_causal", False):
            seen = seen & torch.ones(q.shape[2], length, dtype=torch.bool).tril()
        mask = kwargs.pop("attn_mask", None) if len(args) < 4 else args[3]
        if mask is not None and mask.dtype == torch.bool:
            seen = seen & mask
        elif mask is not None:
            seen = mask.masked_fill(~seen, torch.finfo(mask.dtype).min)
        return func(q, k, v, attn_mask=seen, **kwargs)


@contextmanager
def hidden_from(layers: Any, first: int, gone: Tensor) -> Iterator[None]:
    """Layers from `first` on attend as if the columns `gone` [B, L] weren't there."""
    undo = []
    for layer in layers[first:]:

        def run(*args: Any, forward: Any = layer.forward, **kwargs: Any) -> Any:
            mask = kwargs.get("attention_mask")
            if isinstance(mask, Tensor) and mask.dim() == 4 and mask.is_floating_point():
                hide = gone[:, None, None, :] & ~torch.eye(gone.shape[1], dtype=torch.bool)
                kwargs["attention_mask"] = mask.masked_fill(hide, torch.finfo(mask.dtype).min)
                return forward(*args, **kwargs)
            with Hidden(gone):
                return forward(*args, **kwargs)

        layer.forward = run
        undo.append(layer)
    try:
        yield
    finally:
        for layer in undo:
            del layer.forward


def _left(gone: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """[B, n] columns that aren't `gone`, padded on the left by others, and which of them are real."""
    there = ~gone & mask.bool()
    most = int(there.sum(1).max())
    columns, real = (
        torch.zeros(len(gone), most, dtype=torch.int64),
        torch.zeros(len(gone), most, dtype=torch.bool),
    )
    for row in range(len(gone)):
        kept = there[row].nonzero()[:, 0]
        columns[row, most - len(kept) :] = kept
        real[row, most - len(kept) :] = True
    return columns, real


def _cut(value: Any, columns: Tensor, real: Tensor, length: int) -> Any:
    """What is given by column, at `columns`: ids, states, tables, and masks on both of their axes."""
    if isinstance(value, tuple):
        return tuple(_cut(each, columns, real, length) for each in value)
    if not isinstance(value, Tensor) or length not in value.shape[-3:]:
        return value
    rows = len(columns)
    if value.dim() == 4 and value.shape[-2:] == (length, length):
        value = value.expand(rows, *value.shape[1:])
        parts = [value[row][:, columns[row]][:, :, columns[row]] for row in range(rows)]
        cut = torch.stack(parts)
        eye = torch.eye(cut.shape[-1], dtype=torch.bool)
        hide = ~real[:, None, None, :] & ~eye
        return cut & ~hide if cut.dtype == torch.bool else cut.masked_fill(hide, torch.finfo(cut.dtype).min)
    if value.dim() == 2:
        value = value.expand(rows, -1)
        cut = value.gather(1, columns)
        return cut * real if value.dtype in (torch.int64, torch.bool) else cut
    axis = (
        2
        if value.shape[2] == length and value.dim() > 3 or value.shape[0] != rows and value.shape[1] == rows
        else 1
    )
    value = value.expand(*value.shape[: axis - 1], rows, *value.shape[axis:])
    parts = [value.select(axis - 1, row).index_select(axis - 1, columns[row]) for row in range(rows)]
    return torch.stack(parts, axis - 1)


@contextmanager
def shortened(model: Any, first: int, mask: Tensor, gone: Tensor) -> Iterator[None]:
    """Layers from `first` on are given the columns that aren't `gone` [B, L], cut out by hand."""
    layers, undo = decoder_of(model).layers, []
    length = gone.shape[1]
    columns, real = _left(gone, torch.nn.functional.pad(mask, (0, length - mask.shape[1]), value=1))
    for layer in layers[first:]:
        names = list(inspect.signature(layer.forward).parameters)

        def run(*args: Any, forward: Any = layer.forward, names: list[str] = names, **kwargs: Any) -> Any:
            given = dict(zip(names, args)) | kwargs
            return forward(**{k: _cut(v, columns, real, length) for k, v in given.items()})

        layer.forward = run
        undo.append(layer)
    try:
        yield
    finally:
        for layer in undo:
            del layer.forward


def greedy(
    model: Any, inputs: Mapping[str, Any], hide: Callable[[Tensor], Any] | None, gone: Tensor
) -> tuple[Tensor, Tensor]:
    """Words [B, STEPS] and logits [STEPS, B, V]: the growing prompt is run anew, without cache, with `gone` [B, L] hidden."""
    given, words, logits = dict(inputs), [], []
    prefixed = model.config.model_type in PREFIXED
    for _ in range(STEPS):
        extra = given["input_ids"].shape[1] - gone.shape[1]
        with ExitStack() as stack:
            if hide is not None:
                stack.enter_context(hide(torch.nn.functional.pad(gone, (0, extra))))
            out = _generate(model, given, use_cache=False, max_new_tokens=1)
        word = out.sequences[:, -1:]
        words.append(word)
        logits.append(out.logits[0])
        given["input_ids"] = torch.cat([given["input_ids"], word], 1)
        given["attention_mask"] = torch.cat([given["attention_mask"], torch.ones_like(word)], 1)
        for name in TYPES:
            if name in given:
                given[name] = torch.nn.functional.pad(given[name], (0, 1), value=int(prefixed))
    return torch.cat(words, 1), _finite(torch.stack(logits))


def _generate(model: Any, inputs: Mapping[str, Any], **settings: Any) -> Any:
    return model.generate(
        **inputs, do_sample=False, suppress_tokens=placeholders(model), output_logits=True, return_dict_in_generate=True, **settings
    )  # fmt: skip


def placeholders(model: Any) -> list[int]:
    """The ids that stand for tokens of pictures and videos."""
    found = set()
    for kind in ("image", "video"):
        with suppress(SecateurError):
            found.add(placeholder(model, kind))
    return sorted(found)


def run(model: Any, inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Words and logits of the model's own greedy generation."""
    out = _generate(model, inputs, max_new_tokens=STEPS)
    return out.sequences[:, inputs["input_ids"].shape[1] :], _finite(torch.stack(out.logits))


def _finite(logits: Tensor) -> Tensor:
    """Without the words that a model forbids."""
    return logits.masked_fill(logits < -1e30, 0)


# -- what is judged --


def attached(model: Any, inputs: Mapping[str, Any], at: str, gone: Tensor) -> tuple[Tensor, Tensor]:
    """Words and logits where exactly the columns `gone` leave at a stage."""
    visual = torch.isin(inputs["input_ids"], torch.tensor(placeholders(model)))
    numbers = [gone[row, visual[row]] for row in range(len(gone))]

    def select(sets: Any) -> Tensor:
        keep = torch.ones_like(sets.valid)
        for s in range(len(sets)):
            there = sets.valid[s]
            keep[s, there] = ~numbers[int(sets.row[s])][sets.index[s, there]]
        return keep

    chosen = secateur.attach(model, select, at=at, target="50%", scope="row")
    chosen.method.newlines = "compete"
    with chosen:
        return run(model, inputs)


def placed_by(model: Any, inputs: Mapping[str, Any]) -> str:
    """What tells where tokens lie on a picture: "file", "grid" or "unknown"; "wrong" where changed patches say otherwise."""
    family = family_of(model)
    if family.measure is None:
        return "file"
    output = encoded(model, inputs)
    layout = family.measure(model, inputs, "image", output)
    if bool((layout.grid == 0).any()):
        return "unknown"
    before = torch.cat(parts_of(output, sum(ROWS)))
    pixels = inputs["pixel_values"]
    side = round((len(pixels) / len(before)) ** 0.5)
    # patches lie either token by token or in raster order
    by_token, by_row = torch.arange(len(pixels)) // side**2, []
    for picture, (h, w) in enumerate(layout.grid.tolist()):
        place = torch.arange(h * w * side**2)
        first = int((layout.image < picture).sum())
        by_row.append(first + place // (w * side) // side * w + place % (w * side) // side)
    probes = torch.arange(0, len(pixels), 5)
    moved = []
    for patch in probes:
        changed = pixels.clone()
        changed[patch] += 20
        after = torch.cat(parts_of(encoded(model, {**inputs, "pixel_values": changed}), sum(ROWS)))
        moved.append(int((after - before).abs().sum(1).argmax()))
    found = torch.tensor(moved)
    raster = layout.grid_row * layout.grid[layout.crop, 1] + layout.grid_col
    in_order = all(bool((raster[layout.image == i].diff() == 1).all()) for i in range(len(layout.grid)))
    agree = torch.equal(found, by_token[probes]) or torch.equal(found, torch.cat(by_row)[probes])
    return "grid" if agree and in_order else "wrong"


def _states(model: Any, first: int) -> bool:
    """Whether a layer from `first` on keeps a state in place of keys."""
    kinds = getattr(decoder_of(model).config, "layer_types", None) or ()
    return any("attention" not in kind or "linear" in kind for kind in kinds[first:])


def _differs(kind: str, found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> str:
    """What is wrong with words and logits; nothing where they agree."""
    off = float((found[1] - expected[1]).abs().max())
    # norms and softmax run in single precision in most models
    if not torch.equal(found[0], expected[0]) or not off < ROUGH.get(kind, 1e-6) * max(
        1.0, float(expected[1].abs().max())
    ):
        return f"off by {off:.1e}"
    return ""


def judge(kind: str) -> dict[str, Any]:
    """A row of the table."""
    import transformers

    started = time.perf_counter()
    row: dict[str, Any] = dict.fromkeys(FIELDS, "")
    row["type"], row["transformers"] = kind, transformers.__version__
    reasons = []
    stage = "built"
    try:
        model = model_of(kind)
        row["built"] = "yes"
        stage = "family"
        family = family_of(model)
        row["family"] = "known" if model.config.model_type in VLMS else "derived"
        stage = "inputs"
        inputs = inputs_of(model, kind)
        ids = inputs["input_ids"]
        row["places"] = placed_by(model, inputs)
        full = run(model, inputs)
        if not bool(torch.isfinite(full[1]).all()):
            raise ValueError("the model itself gives no finite logits")
        stage = "keep_all"
        none = torch.zeros_like(ids, dtype=torch.bool)
        row["keep_all"] = "yes" if torch.equal(attached(model, inputs, "input", none)[1], full[1]) else "no"
        drawn = torch.rand(ids.shape, generator=torch.Generator().manual_seed(2)) < 0.5
        gone = drawn & (ids == placeholder(model, "image"))
        layers = decoder_of(model).layers
        first = min(max(2, family.first_layer(model)), len(layers) - 1)
        for stage, at, number in (("input", "input", 0), ("layer", f"layer:{first}", first)):
            try:
                hide: Callable[[Tensor], Any] = (
                    (lambda g, n=number: shortened(model, n, inputs["attention_mask"], g))
                    if _states(model, number)
                    else (lambda g, n=number: hidden_from(layers, n, g))
                )
                expected = greedy(model, inputs, hide, gone)
                if float((expected[1][0] - full[1][0]).abs().max()) < 1e-5:
                    raise ValueError("hiding tokens changes nothing")
                wrong = _differs(kind, attached(model, inputs, at, gone), expected)
                row[stage] = "no" if wrong else "yes"
                reasons += [f"{stage}: {wrong}"] if wrong else []
            except Exception as error:  # noqa: BLE001 - a row of the table says what happened
                row[stage] = "refused" if isinstance(error, SecateurError) else "no"
                reasons.append(f"{stage}: {_said(error)}")
    except Exception as error:  # noqa: BLE001 - a row of the table says what happened
        row[stage] = "refused" if isinstance(error, SecateurError) else "no"
        reasons.append(f"{stage}: {_said(error)}")
    row["seconds"] = f"{time.perf_counter() - started:.1f}"
    row["reason"] = "; ".join(reasons)
    return row


def _said(error: Exception) -> str:
    text = " ".join(str(error).split())[:200]
    if isinstance(error, SecateurError):
        return text
    if os.environ.get("VLM_TRACE"):
        traceback.print_exception(error)
    return f"{type(error).__name__}: {text}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("types", nargs="*")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--summary", type=Path)
    parser.add_argument("--shard", help="i/n: every n-th type from the i-th")
    given = parser.parse_args()
    if given.summary:
        rows = list(csv.DictReader(given.summary.open()))
        for name in FIELDS[1:7]:
            print(
                name,
                {value: sum(row[name] == value for row in rows) for value in sorted({r[name] for r in rows})},
            )
        return
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    chosen = given.types or types()
    if given.shard:
        number, of = map(int, given.shard.split("/"))
        chosen = chosen[number::of]
    rows = []
    for kind in chosen:
        rows.append(judge(kind))
        print(" | ".join(str(rows[-1][name]) for name in FIELDS), flush=True)
    if given.out:
        with given.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, FIELDS, extrasaction="ignore", lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
