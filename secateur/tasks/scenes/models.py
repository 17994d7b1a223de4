"""The two small vision-language models that are trained on `scenes`: a LLaVA with a CLS token, a Qwen2.5-VL without."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur.errors import SecateurError, choose
from secateur.io.transformers import quiet
from secateur.tasks.scenes.draw import (
    BOS,
    END_VISION,
    EOS,
    GRID,
    IMAGE,
    PAD,
    PATCH,
    SIZE,
    VIDEO,
    VISION,
    WORDS,
)
from secateur.utils.files import atomic_directory, atomic_write_json
from secateur.utils.running import device_of
from secateur.utils.schema import read_object

VARIANTS = ("llava", "qwen")
WIDTH, DEPTH, HEADS, INNER, CONTEXT = 128, 4, 4, 384, 512
EYE, EYE_INNER, FINE, MERGE, WINDOW, FRAMES = 96, 288, 4, 2, 4, 2
MEAN, DEVIATION = 0.5, 0.25
WEIGHTS = Path(__file__).parents[1] / "weights"
TOKENS = GRID**2


def build(variant: str = "llava", seed: int = 0) -> Any:
    """An untrained model, float32, in training mode.

    >>> type(build("llava")).__name__
    'LlavaForConditionalGeneration'

    llava: CLIP (4 layers of 128, patches of 8 pixels, CLS) and Llama (4 layers of 128); 64 visual tokens for a 64 x 64
    picture; features of the last layer but one. qwen: Qwen2.5-VL; 256 patches of 4 pixels, windows of 8 x 8 patches in
    blocks 0 and 2, 2 x 2 patches merged into one of 64 tokens; no CLS.
    """
    choose(variant, VARIANTS, error="no model of this kind", where=variant)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _llava() if variant == "llava" else _qwen()


def _text() -> dict:
    return {
        "hidden_size": WIDTH,
        "intermediate_size": INNER,
        "num_hidden_layers": DEPTH,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "vocab_size": len(WORDS),
        "max_position_embeddings": CONTEXT,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "initializer_range": 0.04,
    }


def _llava() -> Any:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=DEPTH,
        num_attention_heads=HEADS,
        image_size=SIZE,
        patch_size=PATCH,
        hidden_act="gelu",
    )
    text = LlamaConfig(**_text(), rope_parameters={"rope_type": "default", "rope_theta": 10000.0})
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=TOKENS,
    )
    return LlavaForConditionalGeneration(config)


def _qwen() -> Any:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
    config = Qwen2_5_VLConfig(
        text_config={**_text(), "rope_parameters": rope},
        vision_config={
            "depth": DEPTH,
            "hidden_size": EYE,
            "intermediate_size": EYE_INNER,
            "num_heads": HEADS,
            "patch_size": FINE,
            "spatial_merge_size": MERGE,
            "temporal_patch_size": FRAMES,
            "window_size": WINDOW * MERGE * FINE,
            "fullatt_block_indexes": [1, 3],
            "out_hidden_size": WIDTH,
        },
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=VISION,
        vision_end_token_id=END_VISION,
    )
    return Qwen2_5_VLForConditionalGeneration(config)


def variant_of(model: Any) -> str:
    """`llava` or `qwen`."""
    return "llava" if model.config.model_type == "llava" else "qwen"


def frame(variant: str) -> tuple[list[int], list[int]]:
    """What stands before and behind the visual tokens."""
    return ([BOS], []) if variant == "llava" else ([VISION], [END_VISION])


def pixels(pictures: Tensor, variant: str) -> Tensor:
    """`pixel_values` of pictures uint8 [B, 3, 64, 64]: [B, 3, 64, 64] for llava, [B, 256, 96] for qwen.

    qwen: patches of 3 colours x 2 equal frames x 4 x 4 pixels, the four of one token together.
    """
    values = (pictures.float() / 255 - MEAN) / DEVIATION
    if variant == "llava":
        return values
    patches = values.view(-1, 3, GRID, MERGE, FINE, GRID, MERGE, FINE).permute(0, 2, 5, 3, 6, 1, 4, 7)
    patches = patches.reshape(len(values), TOKENS * MERGE**2, 3, 1, FINE, FINE)
    return patches.expand(-1, -1, -1, FRAMES, -1, -1).flatten(2)


def eye_block(block: Any, x: Tensor, cos: Tensor, sin: Tensor, groups: int) -> Tensor:
    """A block of the Qwen tower on [B, 256, C] in window order, attention within each of `groups` equal windows."""
    batch, length, _ = x.shape

    def turn(y: Tensor) -> Tensor:
        first, second = y.float().chunk(2, -1)
        return (y.float() * cos + torch.cat([-second, first], -1) * sin).to(y.dtype)

    parts = block.attn.qkv(block.norm1(x)).view(batch, length, 3, HEADS, -1)
    q, k, v = turn(parts[:, :, 0]), turn(parts[:, :, 1]), parts[:, :, 2]
    q, k, v = (y.reshape(batch * groups, length // groups, HEADS, -1).transpose(1, 2) for y in (q, k, v))
    mixed = ((q * block.attn.scaling) @ k.transpose(-1, -2)).softmax(-1).to(v.dtype) @ v
    x = x + block.attn.proj(mixed.transpose(1, 2).reshape(batch, length, -1))
    return x + block.mlp(block.norm2(x))


def see(model: Any, values: Tensor, run: Callable[..., Tensor] = eye_block) -> tuple[Tensor, Tensor | None]:
    """What the tower makes of `pixels`: hidden [B, 64, k, C] of each token's k patches, and the pooled CLS [B, C] or None.

    The same numbers as the class's own forward, for a batch of equal pictures without a loop over windows. run: a
    compiled `eye_block`.
    """
    if variant_of(model) == "llava":
        found = model.model.vision_tower(values, output_hidden_states=True)
        return found.hidden_states[-2][:, 1:, None], found.pooler_output
    tower = model.model.visual
    place = torch.arange(GRID, device=values.device) * MERGE
    inner = torch.arange(MERGE, device=values.device)
    row = (place[:, None, None, None] + inner[:, None]).expand(GRID, GRID, MERGE, MERGE)
    column = (place[:, None, None] + inner).expand(GRID, GRID, MERGE, MERGE)
    side = GRID // WINDOW
    order = torch.arange(TOKENS, device=values.device).view(side, WINDOW, side, WINDOW)
    order = order.transpose(1, 2).flatten()

    def windows(x: Tensor) -> Tensor:
        return x.unflatten(-2, (TOKENS, MERGE**2))[..., order, :, :].flatten(-3, -2)

    x = windows(F.linear(values, tower.patch_embed.proj.weight.flatten(1)))
    angles = tower.rotary_pos_emb(x, torch.stack([row.flatten(), column.flatten()], 1))
    cos, sin = (windows(part)[:, None] for part in angles)
    for number, block in enumerate(tower.blocks):
        x = run(block, x, cos, sin, 1 if number in tower.fullatt_block_indexes else side**2)
    return x.unflatten(1, (TOKENS, MERGE**2))[:, order.argsort()], None


def project(model: Any, hidden: Tensor) -> Tensor:
    """The visual tokens [B, 64, 128] that the language model reads, of what `see` gives."""
    if variant_of(model) == "llava":
        return model.model.multi_modal_projector(hidden[:, :, 0])
    merger = model.model.visual.merger
    return merger.mlp(merger.ln_q(hidden).flatten(2))


def tower_of(model: Any) -> list[nn.Parameter]:
    """The parameters that `see` uses."""
    if variant_of(model) == "llava":
        return list(model.model.vision_tower.parameters())
    return [p for n, p in model.model.visual.named_parameters() if not n.startswith("merger")]


def projector_of(model: Any) -> list[nn.Parameter]:
    """The parameters that `project` uses."""
    inner = model.model
    return list(
        (inner.multi_modal_projector if variant_of(model) == "llava" else inner.visual.merger).parameters()
    )


def inputs(model: Any, pictures: Tensor, questions: list[list[int]]) -> dict[str, Tensor]:
    """What `model(**inputs)` and `model.generate(**inputs)` take: one row a picture (uint8 [B, 3, 64, 64]) and question.

    Pictures [B, P, 3, 64, 64] are P a row, one behind the other.

    >>> given = inputs(build(), torch.zeros(2, 3, 64, 64, dtype=torch.uint8), [[10, 11], [10]])
    >>> given["input_ids"].shape, given["attention_mask"].sum(1).tolist()
    (torch.Size([2, 67]), [67, 66])

    Questions are word numbers (`scenes.encode`); shorter ones are padded on the left.
    """
    variant = variant_of(model)
    device = device_of(model)
    before, after = frame(variant)
    each = 1 if pictures.dim() == 4 else pictures.shape[1]
    pictures = pictures.reshape(-1, *pictures.shape[-3:])
    rows = [[*[*before, *[IMAGE] * TOKENS, *after] * each, *question] for question in questions]
    longest = max(map(len, rows))
    ids = torch.tensor([[PAD] * (longest - len(row)) + row for row in rows], device=device)
    made = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device)
    values = pixels(pictures.to(device), variant).to(next(model.parameters()).dtype)
    if variant == "llava":
        return {"input_ids": ids, "attention_mask": made, "pixel_values": values}
    side = GRID * MERGE
    return {
        "input_ids": ids,
        "attention_mask": made,
        "pixel_values": values.flatten(0, 1),
        "image_grid_thw": torch.tensor([[1, side, side]] * len(pictures), device=device),
        "mm_token_type_ids": (ids == IMAGE).int(),
    }


def save_scenes(model: Any, folder: str | Path, about: dict[str, Any]) -> None:
    """Writes the model as a transformers folder in float16, and `about` beside it as scenes.json."""
    with atomic_directory(folder) as partial:
        copy.deepcopy(model).half().save_pretrained(partial)
        atomic_write_json(partial / "scenes.json", about)


def load_scenes(name: str | Path = "llava", seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """A trained model in eval mode: one that comes with the library, or a folder that `train scenes` wrote.

    >>> model = load_scenes("llava", seed=1)  # doctest: +SKIP

    `model.scenes` holds what is known of it: recipe, cost, accuracy. Raises `SecateurError` where there is none.
    """
    folder = Path(name)
    if str(name) in VARIANTS:
        folder = WEIGHTS / f"scenes-{name}-{seed}"
    if not (folder / "scenes.json").is_file():
        there = ", ".join(sorted(path.name for path in WEIGHTS.glob("scenes-*")))
        raise SecateurError(
            "no model of the scenes is here",
            where=str(folder),
            fix=f"one of {there}; or secateur train scenes --out FOLDER, and load that",
        )
    from transformers import AutoModelForImageTextToText

    with quiet():
        model = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype)
    model.scenes = read_object(folder / "scenes.json")  # type: ignore[assignment]
    return model.eval()


def scenes_tokenizer() -> Any:
    """The vocabulary as a fast tokenizer: a token a word, lower case.

    >>> scenes_tokenizer().decode(scenes_tokenizer()("How many circles?").input_ids)
    'how many circles ?'
    """
    from tokenizers import Tokenizer, normalizers, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    fast = Tokenizer(WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    fast.normalizer = normalizers.Lowercase()
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=fast,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
        extra_special_tokens=["<image>", "<video>", "<vision>", "</vision>"],
        clean_up_tokenization_spaces=False,
    )
