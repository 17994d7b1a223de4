"""What GGUF files say of a family of models: the name of its architecture, the order of its rotary rows, its extra numbers.

Facts read off llama.cpp (src/models, gguf-py) and of transformers' configs; each family's files are compared with
llama.cpp's own outputs by `benchmarks/gguf_files.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Rule = tuple[str, Callable[[Any], bool], str]
"""(field of the config, whether its value can be said, what can be)."""

NO_WINDOW: Rule = (
    "sliding_window",
    lambda config: not getattr(config, "sliding_window", None),
    "no sliding window",
)


@dataclass(frozen=True)
class GgufFamily:
    """How a family is written.

    architecture: its name in the file. pairs: whether rows of queries and keys stand in rotated pairs instead of two halves.
    layered: the architecture of files whose layers differ; None where llama.cpp reads one width for all.
    shift: added to the weights of norms. numbers: what else is written, key -> value of a config. rules: what configs must
    say, since the file can't say otherwise. scaled: whether positions may be scaled.
    """

    architecture: str
    pairs: bool = False
    layered: str | None = None
    shift: float = 0.0
    numbers: Mapping[str, Callable[[Any], Any]] = field(default_factory=dict)
    rules: tuple[Rule, ...] = ()


FAMILIES: dict[str, GgufFamily] = {
    "llama": GgufFamily("llama", pairs=True, layered="deci"),
    "mistral": GgufFamily("llama", pairs=True, layered="deci", rules=(NO_WINDOW,)),
    "qwen2": GgufFamily(
        "qwen2",
        rules=(("use_sliding_window", lambda config: not config.use_sliding_window, "no sliding window"),),
    ),
    "qwen3": GgufFamily(
        "qwen3",
        rules=(
            ("use_sliding_window", lambda config: not config.use_sliding_window, "no sliding window"),
            ("attention_bias", lambda config: not config.attention_bias, "attention without biases"),
        ),
    ),
    "gemma": GgufFamily("gemma", shift=1.0),
    "gemma2": GgufFamily(
        "gemma2",
        shift=1.0,
        numbers={
            "attn_logit_softcapping": lambda config: config.attn_logit_softcapping,
            "final_logit_softcapping": lambda config: config.final_logit_softcapping,
            "attention.sliding_window": lambda config: config.sliding_window,
        },
        rules=(
            (
                "query_pre_attn_scalar",
                lambda config: config.query_pre_attn_scalar == config.head_dim,
                "the head's width as query_pre_attn_scalar",
            ),
        ),
    ),
    "granite": GgufFamily(
        "granite",
        pairs=True,
        numbers={
            "embedding_scale": lambda config: config.embedding_multiplier,
            "residual_scale": lambda config: config.residual_multiplier,
            "attention.scale": lambda config: config.attention_multiplier,
            "logit_scale": lambda config: config.logits_scaling,
        },
    ),
    "olmo2": GgufFamily("olmo2"),
    "smollm3": GgufFamily(
        "smollm3",
        pairs=True,
        rules=(
            NO_WINDOW,
            (
                "no_rope_layers",
                lambda config: (
                    list(config.no_rope_layers)
                    == [int((place + 1) % 4 != 0) for place in range(config.num_hidden_layers)]
                ),
                "every fourth layer without positions",
            ),
        ),
    ),
}
"""By the config's model_type."""

ACTIVATIONS = {"gemma": ("gelu_pytorch_tanh", "gelu"), "gemma2": ("gelu_pytorch_tanh",)}
"""What a family's MLP may use; silu where it isn't named."""

WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {WORDS + r"\p{N}{1,3}" + REST: "llama-bpe", WORDS + r"\p{N}" + REST: "qwen2"}
"""Expressions that byte-level tokenizers split text by, and what llama.cpp calls them."""
