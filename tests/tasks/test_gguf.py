"""Conversion against a GGUF file that is written here with llama.cpp's own permutation and names."""

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from torch import nn

from secateur.errors import SecateurError
from secateur.tasks.gguf import convert, hf_name, rotary_to_halves

BYTES = ["Ġ", "a", "b", "c", "1", "2", "Ċ"]
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *BYTES, "ab", "Ġab", "11", "abc"]
MERGES = ["a b", "Ġ ab", "1 1", "ab c"]
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def llama_cpp_permute(weight: np.ndarray, heads: int) -> np.ndarray:
    """`LlamaModel.permute` of llama.cpp's convert_hf_to_gguf.py."""
    shape = (heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return weight.reshape(shape).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path: Path, model: nn.Module, quantised: bool = False, **changes: str) -> Path:
    config = model.config
    writer = gguf.GGUFWriter(str(path), changes.get("architecture", "llama"))
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(changes.get("pre", "smollm"))
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3, 3] + [1] * (len(TOKENS) - 3))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{% for m in messages %}<|im_start|>{{ m['content'] }}{% endfor %}")
    for name, parameter in model.named_parameters():
        value, parts = parameter.detach().numpy(), name.split(".")
        if name.startswith("model.layers."):
            kind = ".".join(parts[3:-1])
            if kind.endswith(("q_proj", "k_proj")):
                heads = config.num_attention_heads if kind.endswith("q_proj") else config.num_key_value_heads
                value = llama_cpp_permute(value, heads)
            new = f"blk.{parts[2]}.{NAMES[kind]}.weight"
        else:
            new = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}[
                parts[-2]
            ] + ".weight"
        if quantised and value.ndim == 2 and value.shape[1] % 32 == 0:
            kind_of = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(new, gguf.quants.quantize(value, kind_of), raw_dtype=kind_of)
        else:
            writer.add_tensor(new, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("gqa", [True, False])
def test_the_converted_model_gives_the_logits_of_the_original(
    tmp_path: Path, tiny_llama: Callable[..., nn.Module], tied: bool, gqa: bool
) -> None:
    from transformers import AutoModelForCausalLM

    model = tiny_llama(gqa, vocab_size=len(TOKENS), tie_word_embeddings=tied)
    (tmp_path / "out").mkdir()
    convert(write_gguf(tmp_path / "m.gguf", model), tmp_path / "out")
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    ids = torch.arange(10)[None] % len(TOKENS)
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)


def test_quantised_weights_are_undone(tmp_path: Path, tiny_llama: Callable[..., nn.Module]) -> None:
    from safetensors.torch import load_file

    model = tiny_llama(vocab_size=len(TOKENS))
    (tmp_path / "out").mkdir()
    convert(write_gguf(tmp_path / "m.gguf", model, quantised=True), tmp_path / "out", torch.bfloat16)
    state = load_file(tmp_path / "out" / "model.safetensors")
    name = "model.layers.1.self_attn.k_proj.weight"
    assert state[name].dtype == torch.bfloat16
    worst = (state[name].float() - model.get_parameter(name)).abs().max()
    assert 0 < worst < model.get_parameter(name).abs().max() / 100


def test_the_tokenizer_merges_in_order_splits_digits_and_knows_the_chat(
    tmp_path: Path, tiny_llama: Callable[..., nn.Module]
) -> None:
    from transformers import AutoTokenizer

    (tmp_path / "out").mkdir()
    convert(write_gguf(tmp_path / "m.gguf", tiny_llama(vocab_size=len(TOKENS))), tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "abc ab11\nc<|im_end|>"
    assert tokenizer.tokenize(text) == ["abc", "Ġab", "1", "1", "Ċ", "c", "<|im_end|>"]
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    chat = tokenizer.apply_chat_template([{"content": "abc"}], tokenize=False)
    assert chat == "<|im_start|>abc"


def test_names_and_rotary_rows() -> None:
    assert hf_name("blk.12.ffn_down.weight") == "model.layers.12.mlp.down_proj.weight"
    assert hf_name("output.weight") == "lm_head.weight"
    rows = torch.tensor([0, 2, 1, 3, 4, 6, 5, 7])[:, None]  # two heads of 4: pairs (0, 2), (1, 3)
    assert rotary_to_halves(rows, 2).flatten().tolist() == list(range(8))


@pytest.mark.parametrize(
    ("change", "reason"), [({"architecture": "mamba"}, "mamba"), ({"pre": "qwen2"}, "qwen2")]
)
def test_what_cannot_be_converted_is_refused(
    tmp_path: Path, tiny_llama: Callable[..., nn.Module], change: dict[str, str], reason: str
) -> None:
    source = write_gguf(tmp_path / "m.gguf", tiny_llama(vocab_size=len(TOKENS)), **change)
    with pytest.raises(SecateurError, match=reason):
        convert(source, tmp_path)


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"hello world, this is not a model" * 10)
    with pytest.raises(SecateurError, match="not a GGUF file"):
        convert(tmp_path / "m.gguf", tmp_path)
