"""The small vision-language-action model of the rooms: a LLaVA whose words are a mission and whose answers are actions."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.errors import SecateurError
from secateur.io.transformers import quiet
from secateur.tasks.minigrid.rooms import BOS, CELLS, IMAGE, PAD, TILE, VIEW, WORDS, draw
from secateur.utils.files import atomic_directory, atomic_write_json
from secateur.utils.running import device_of
from secateur.utils.schema import read_object

WIDTH, DEPTH, HEADS, INNER = 80, 4, 4, 208
EYE, EYE_DEPTH, EYE_INNER = 64, 1, 128
WEIGHTS = Path(__file__).parents[1] / "weights"


def build(seed: int = 0) -> Any:
    """An untrained policy, float32, in training mode.

    >>> type(build()).__name__
    'LlavaForConditionalGeneration'

    CLIP (a block of 64, patches of 8 pixels: a token a cell, 49 in all) and Llama (4 layers of 80); 0.4 M parameters.
    """
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(
        hidden_size=EYE,
        intermediate_size=EYE_INNER,
        num_hidden_layers=EYE_DEPTH,
        num_attention_heads=HEADS,
        image_size=VIEW * TILE,
        patch_size=TILE,
        hidden_act="gelu",
    )
    text = LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=DEPTH,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        vocab_size=len(WORDS),
        max_position_embeddings=128,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=None,
        initializer_range=0.04,
        tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=CELLS,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = LlavaForConditionalGeneration(config)
        # what enters is no smaller than what the layers add to it
        model.get_input_embeddings().weight.data.mul_(5)
        model.model.multi_modal_projector.linear_2.weight.data.mul_(10)
        # in the first layer a word looks for what is like it: keys begin as queries do
        first = model.model.language_model.layers[0].self_attn
        first.k_proj.weight.data.copy_(first.q_proj.weight.data.mul_(3))
    model.generation_config.eos_token_id = None
    return model


def pixels(cells: Tensor) -> Tensor:
    """`pixel_values` [B, 3, 56, 56] of tiles [B, 49]."""
    return draw(cells).float() / 127.5 - 1


def inputs(model: Any, cells: Tensor, words: Tensor) -> dict[str, Tensor]:
    """What `model(**inputs)` and `model.generate(**inputs)` take: tiles [B, 49] and prompts [B, 5]."""
    device = device_of(model)
    ids = torch.cat([torch.full((len(words), CELLS), IMAGE), words], 1).to(device)
    values = pixels(cells.to(device)).to(next(model.parameters()).dtype)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": values}


def save_policy(model: Any, folder: str | Path, about: dict[str, Any]) -> None:
    """Writes the policy as a transformers folder in float16, and `about` beside it as minigrid.json."""
    with atomic_directory(folder) as partial:
        copy.deepcopy(model).half().save_pretrained(partial)
        atomic_write_json(partial / "minigrid.json", about)


def load_policy(folder: str | Path | None = None, dtype: torch.dtype = torch.float32) -> Any:
    """A trained policy in eval mode: the one that comes with the library, or a folder that `train minigrid` wrote.

    >>> policy = load_policy()  # doctest: +SKIP

    `policy.minigrid` holds what is known of it: recipe, cost, success. Raises `SecateurError` where there is none.
    """
    path = WEIGHTS / "minigrid-0" if folder is None else Path(folder)
    if not (path / "minigrid.json").is_file():
        raise SecateurError(
            "no policy for the rooms is here", where=str(path), fix="secateur train minigrid --out DIR"
        )
    from transformers import AutoModelForImageTextToText

    with quiet():
        model = AutoModelForImageTextToText.from_pretrained(path, dtype=dtype)
    model.minigrid = read_object(path / "minigrid.json")  # type: ignore[assignment]
    return model.eval()
