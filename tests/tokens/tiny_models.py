"""Tiny random vision-language models, one a family, and inputs for them: 3 left-padded rows with 2, 1 and 0 images."""

from __future__ import annotations

from typing import Any

import torch
import transformers as tf

IMAGE, VIDEO, PAD = 5, 6, 0
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": None,
    "max_position_embeddings": 512,
}
VISION = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 4,
}
IDS = {"image_token_id": IMAGE, "pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": None}


def llama(**more: Any) -> tf.PreTrainedConfig:
    return tf.LlamaConfig(**{**TEXT, "tie_word_embeddings": False, **more})


def qwen2(**more: Any) -> tf.PreTrainedConfig:
    return tf.Qwen2Config(**{**TEXT, "tie_word_embeddings": False, **more})


def clip() -> tf.PreTrainedConfig:
    return tf.CLIPVisionConfig(**VISION)


def siglip(**more: Any) -> tf.PreTrainedConfig:
    return tf.SiglipVisionConfig(**{**VISION, "vision_use_head": False, **more})


def _llava(tower: Any, text: Any, **more: Any) -> Any:
    return tf.LlavaForConditionalGeneration(
        tf.LlavaConfig(vision_config=tower, text_config=text, tie_word_embeddings=False, **{**IDS, **more})
    )


PINPOINTS = [[16, 32], [32, 16], [32, 32]]
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}


def _make(family: str) -> Any:
    if family == "llava-clip":
        return _llava(clip(), llama(), vision_feature_layer=-2, vision_feature_select_strategy="default")
    if family == "llava-siglip":
        return _llava(siglip(), qwen2(), vision_feature_layer=-1, vision_feature_select_strategy="full")
    if family == "llava-next":
        return tf.LlavaNextForConditionalGeneration(
            tf.LlavaNextConfig(
                vision_config=clip(), text_config=llama(), image_grid_pinpoints=PINPOINTS, vision_feature_layer=-2,
                tie_word_embeddings=False, **IDS,
            )
        )  # fmt: skip
    if family == "llava-onevision":
        return tf.LlavaOnevisionForConditionalGeneration(
            tf.LlavaOnevisionConfig(
                vision_config=siglip(), text_config=qwen2(), image_grid_pinpoints=PINPOINTS, vision_feature_layer=-1,
                vision_feature_select_strategy="full", video_token_id=VIDEO, tie_word_embeddings=False, **IDS,
            )
        )  # fmt: skip
    special = {"video_token_id": VIDEO, "vision_start_token_id": 7, "vision_end_token_id": 8}
    if family == "qwen2-vl":
        return tf.Qwen2VLForConditionalGeneration(
            tf.Qwen2VLConfig(
                text_config={**TEXT, "rope_parameters": ROPE},
                vision_config={"depth": 4, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "mlp_ratio": 2, "patch_size": 4,
                               "spatial_merge_size": 2, "temporal_patch_size": 1},
                tie_word_embeddings=False, **{**IDS, **special},
            )
        )  # fmt: skip
    if family == "qwen2.5-vl":
        return tf.Qwen2_5_VLForConditionalGeneration(
            tf.Qwen2_5_VLConfig(
                text_config={**TEXT, "rope_parameters": ROPE},
                vision_config={"depth": 4, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "patch_size": 4,
                               "spatial_merge_size": 2, "temporal_patch_size": 1, "window_size": 16,
                               "fullatt_block_indexes": [1, 3], "out_hidden_size": 32},
                tie_word_embeddings=False, **{**IDS, **special},
            )
        )  # fmt: skip
    if family == "qwen3-vl":
        return tf.Qwen3VLForConditionalGeneration(
            tf.Qwen3VLConfig(
                text_config={**TEXT, "head_dim": 8, "rope_parameters": {**ROPE, "mrope_interleaved": True}},
                vision_config={"depth": 4, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "patch_size": 4,
                               "spatial_merge_size": 2, "temporal_patch_size": 1, "out_hidden_size": 32,
                               "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 2]},
                tie_word_embeddings=False, **{**IDS, **special},
            )
        )  # fmt: skip
    if family == "internvl":
        return tf.InternVLForConditionalGeneration(
            tf.InternVLConfig(
                text_config=qwen2(),
                vision_config={**VISION, "image_size": [16, 16], "patch_size": [4, 4], "use_absolute_position_embeddings": True},
                downsample_ratio=0.5, vision_feature_layer=-1, tie_word_embeddings=False, **IDS,
            )
        )  # fmt: skip
    if family in ("idefics3", "smolvlm"):
        config, cls = {
            "idefics3": (tf.Idefics3Config, tf.Idefics3ForConditionalGeneration),
            "smolvlm": (tf.SmolVLMConfig, tf.SmolVLMForConditionalGeneration),
        }[family]
        return cls(
            config(
                text_config=llama(),
                vision_config={**VISION},
                scale_factor=2,
                tie_word_embeddings=False,
                **IDS,
            )
        )
    if family in ("paligemma", "paligemma2"):
        text = dict(TEXT, head_dim=8)
        if family == "paligemma":
            text_config: Any = tf.GemmaConfig(**text)
        else:
            text_config = tf.Gemma2Config(**text, query_pre_attn_scalar=8, sliding_window=256)
        return tf.PaliGemmaForConditionalGeneration(
            tf.PaliGemmaConfig(
                text_config=text_config, vision_config=siglip(projection_dim=32), projection_dim=32, **IDS
            )
        )
    if family == "gemma3":
        text_config = tf.Gemma3TextConfig(
            **dict(TEXT, head_dim=8, query_pre_attn_scalar=8, sliding_window=256),
            layer_types=["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        )
        return tf.Gemma3ForConditionalGeneration(
            tf.Gemma3Config(text_config=text_config, vision_config=siglip(), mm_tokens_per_image=4, **IDS)
        )
    raise KeyError(family)


FAMILIES = (
    "llava-clip", "llava-siglip", "llava-next", "llava-onevision", "qwen2-vl", "qwen2.5-vl", "qwen3-vl", "internvl",
    "idefics3", "smolvlm", "paligemma", "paligemma2", "gemma3",
)  # fmt: skip
TENSOR_TYPES = ("paligemma", "paligemma2", "gemma3")
NAMES = {"llava-clip", "llava-siglip"}


def make(family: str, dtype: torch.dtype = torch.float64) -> Any:
    """A random model in eval mode; weights large enough that dropping tokens moves the logits."""
    torch.manual_seed(0)
    return fill(_make(family), dtype)


def fill(model: Any, dtype: torch.dtype = torch.float64) -> Any:
    """A model with random matrices, in eval mode."""
    model = model.to(dtype).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() >= 2:
                p.normal_(0, 0.5 / p.shape[-1] ** 0.5 if "embed" not in name else 0.5)
    model.generation_config.eos_token_id = None
    return model


def inputs_for(
    family: str, dtype: torch.dtype = torch.float64, rows: tuple[int, ...] = (2, 1, 0), seed: int = 0
) -> dict:
    """What a processor gives: `rows` images a row, left padding."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype)

    images = sum(rows)
    extra: dict[str, Any] = {}
    if family in ("llava-next", "llava-onevision"):
        sizes = [(16, 30), (32, 16), (30, 32)][:images]
        crops = [3, 3, 5][:images]
        extra["pixel_values"] = noise(images, 5, 3, 16, 16)
        extra["image_sizes"] = torch.tensor(sizes)
        counts = [packed(size, 3 if crop == 3 else 5) for size, crop in zip(sizes, crops)]
    elif family.startswith("qwen"):
        grids = [(1, 4, 6), (1, 4, 4), (1, 6, 4)][:images]
        extra["image_grid_thw"] = torch.tensor(grids)
        extra["pixel_values"] = noise(sum(h * w for _, h, w in grids), 48)
        counts = [h * w // 4 for _, h, w in grids]
    elif family in ("idefics3", "smolvlm"):
        pixels = noise(len(rows), max(rows), 3, 16, 16)
        for row, n in enumerate(rows):
            pixels[row, n:] = 0
        extra["pixel_values"] = pixels
        counts = [4] * images
    else:
        extra["pixel_values"] = noise(images, 3, 16, 16)
        counts = [4 if family in ("internvl", "gemma3") else 16] * images

    sequences, image = [], 0
    for row, n in enumerate(rows):
        ids: list[int] = [1, 20 + row]
        for _ in range(n):
            ids += [7] + [IMAGE] * counts[image] + [8, 30 + image]
            image += 1
        ids += torch.randint(40, 90, (4 + row,), generator=generator).tolist()
        sequences.append(ids)
    length = max(map(len, sequences))
    ids_ = torch.full((len(rows), length), PAD)
    mask = torch.zeros_like(ids_)
    for row, ids in enumerate(sequences):
        ids_[row, length - len(ids) :] = torch.tensor(ids)
        mask[row, length - len(ids) :] = 1
    out: dict[str, Any] = {"input_ids": ids_, "attention_mask": mask}
    if images:
        out |= extra
    if family.startswith("qwen"):
        out["mm_token_type_ids"] = (ids_ == IMAGE).long()
    if family in ("paligemma", "paligemma2"):
        out["token_type_ids"] = torch.zeros_like(ids_)
    if family == "gemma3":
        out["token_type_ids"] = (ids_ == IMAGE).long()
    return out


def packed(size: tuple[int, int], crops: int) -> int:
    """Visual tokens of one image of 16-pixel tiles and 4-pixel patches: base, unpadded tiles, a newline a row."""
    best = {(16, 30): (16, 32), (32, 16): (32, 16), (30, 32): (32, 32)}[size]
    rows, cols = best[0] // 4, best[1] // 4
    height, width = size
    if width / height > cols / rows:
        inner = int(round(height * (cols / width), 7))
        rows -= 2 * ((rows - inner) // 2)
    else:
        inner = int(round(width * (rows / height), 7))
        cols -= 2 * ((cols - inner) // 2)
    return 16 + rows * (cols + 1)
