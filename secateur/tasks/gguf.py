"""A GGUF file of a llama-like model as a plain transformers folder: weights, config, tokenizer.

Format: ggml-org/ggml docs/gguf.md. Name map and rotary permutation: llama.cpp convert_hf_to_gguf.py, undone.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from secateur.errors import SecateurError
from secateur.utils.progress import track

BLOCK = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def rotary_to_halves(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of q or k from interleaved rotary pairs (GGUF, llama2.c) to transformers' two halves.

    weight [heads * head_dim, in]; within a head, row 2i + j goes to row j * head_dim / 2 + i.
    """
    rows = weight.shape[0]
    return weight.reshape(heads, rows // heads // 2, 2, -1).transpose(1, 2).reshape(weight.shape)


def hf_name(name: str) -> str:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`."""
    stem, _, suffix = name.rpartition(".")
    if stem in TOP:
        return f"{TOP[stem]}.{suffix}"
    _, layer, part = stem.split(".")
    return f"model.layers.{layer}.{BLOCK[part]}.{suffix}"


def read_fields(reader: Any) -> dict[str, Any]:
    """The metadata of a GGUFReader as a plain dict."""
    return {name: field.contents() for name, field in reader.fields.items()}


def convert(source: str | Path, out: str | Path, dtype: torch.dtype = torch.float32) -> None:
    """Writes the GGUF file `source` as a transformers folder at `out` (which must exist).

    >>> convert("SmolLM2-135M-Instruct.Q4_1.gguf", "smollm2")  # doctest: +SKIP
    >>> AutoModelForCausalLM.from_pretrained("smollm2")  # doctest: +SKIP

    Any quantisation that `gguf.quants` can undo. Raises SecateurError for an architecture other than llama,
    a tokenizer other than byte-level BPE, or a file that is not GGUF.
    """
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    try:
        from gguf import GGUFReader
        from gguf.quants import dequantize
    except ImportError as error:
        raise SecateurError("needs the package gguf", where=str(source), fix="pip install gguf") from error
    try:
        reader = GGUFReader(str(source))
    except (ValueError, IndexError) as error:
        raise SecateurError(f"is not a GGUF file ({error})", where=str(source)) from error
    fields = read_fields(reader)
    if fields["general.architecture"] != "llama":
        raise SecateurError(
            f"holds a {fields['general.architecture']!r} model; only llama is converted",
            where=str(source),
            fix="give a transformers folder instead",
        )

    def field(name: str) -> Any:
        return fields[f"llama.{name}"]

    heads, kv_heads = field("attention.head_count"), field("attention.head_count_kv")
    state = {}
    for tensor in track(reader.tensors, "converting"):
        values = dequantize(tensor.data, tensor.tensor_type).reshape(tuple(reversed(tensor.shape.tolist())))
        value = torch.from_numpy(np.array(values, dtype=np.float32))
        part = tensor.name.split(".")[-2]
        if part in ("attn_q", "attn_k"):
            value = rotary_to_halves(value, heads if part == "attn_q" else kv_heads)
        state[hf_name(tensor.name)] = value.to(dtype)
    tied = "lm_head.weight" not in state
    special: dict[str, Any] = {
        f"{kind}_token_id": fields.get(f"tokenizer.ggml.{name}_token_id")
        for kind, name in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
    }
    config = LlamaConfig(
        vocab_size=len(fields["tokenizer.ggml.tokens"]),
        hidden_size=field("embedding_length"),
        intermediate_size=field("feed_forward_length"),
        num_hidden_layers=field("block_count"),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=field("rope.dimension_count"),
        max_position_embeddings=field("context_length"),
        rms_norm_eps=round(field("attention.layer_norm_rms_epsilon"), 12),
        rope_parameters={"rope_type": "default", "rope_theta": field("rope.freq_base")},
        tie_word_embeddings=tied,
        dtype=dtype,
        **special,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.load_state_dict(state, strict=not tied, assign=True)
    model.tie_weights()
    model.generation_config = GenerationConfig(**special)
    model.save_pretrained(out)
    tokenizer(fields, where=str(source)).save_pretrained(out)


def tokenizer(fields: dict[str, Any], where: str = "gguf") -> Any:
    """The fast tokenizer that GGUF metadata describes: byte-level BPE, merges, special tokens, chat template."""
    from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    kind, split = fields["tokenizer.ggml.model"], fields.get("tokenizer.ggml.pre", "default")
    if kind != "gpt2" or split not in ("smollm", "gpt-2"):
        raise SecateurError(
            f"its tokenizer ({kind}, {split}) is not one that is converted",
            where=where,
            fix="give a transformers folder",
        )
    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    fast = Tokenizer(BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    digits = pre_tokenizers.Digits(individual_digits=True)
    fast.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level]) if split == "smollm" else byte_level
    fast.decoder = decoders.ByteLevel()
    control = [t for t, type_ in zip(tokens, fields["tokenizer.ggml.token_type"], strict=True) if type_ == 3]
    fast.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])

    def named(name: str) -> str | None:
        index = fields.get(f"tokenizer.ggml.{name}_token_id")
        return None if index is None else tokens[index]

    return PreTrainedTokenizerFast(
        tokenizer_object=fast,
        bos_token=named("bos"),
        eos_token=named("eos"),
        unk_token=named("unknown"),
        pad_token=named("padding"),
        chat_template=fields.get("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
        model_max_length=fields["llama.context_length"],
    )
