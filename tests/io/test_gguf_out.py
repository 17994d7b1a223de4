"""GGUF files that are written: names, rotated rows, layers that differ, tokenizers, and what is refused."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import secateur
from secateur import SecateurError
from secateur.graph import trace
from secateur.io.gguf import check_gguf, export_gguf, rotary_to_pairs
from secateur.surgery import cut_units
from secateur.tasks.gguf import convert, rotary_to_halves

SIZES: dict[str, Any] = {
    "vocab_size": 261, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, "max_position_embeddings": 64,
}  # fmt: skip


def byte_level() -> PreTrainedTokenizerFast:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<s>", "</s>", *letters, "th", "the"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("t", "h"), ("th", "e")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def with_bytes_behind() -> PreTrainedTokenizerFast:
    """As SentencePiece makes them: characters, merges, bytes for the rest, a space before every text."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{n:02X}>" for n in range(256)), "▁", "a", "b"]
    merged = ["ab", "▁ab"]
    vocabulary = {token: i for i, token in enumerate([*tokens, *merged])}
    model = models.BPE(vocab=vocabulary, merges=[("a", "b"), ("▁", "ab")], unk_token="<unk>", byte_fallback=True, fuse_unk=True)  # fmt: skip
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")  # fmt: skip


def made(kind: str = "llama", **more: Any) -> Any:
    torch.manual_seed(0)
    dtype = more.pop("dtype", torch.float32)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SIZES, **more}), dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() < 2:
                parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


def read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    reader = gguf.GGUFReader(path)
    return {n: f.contents() for n, f in reader.fields.items()}, {t.name: t for t in reader.tensors}


def test_rotated_rows_stand_in_pairs() -> None:
    rows = torch.arange(8.0)[:, None]  # two heads of width 4: halves (0 1 | 2 3), (4 5 | 6 7)
    assert rotary_to_pairs(rows, 2).reshape(-1).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert torch.equal(rotary_to_halves(rotary_to_pairs(rows, 2), 2), rows)


@pytest.mark.parametrize("tied", [True, False])
def test_the_librarys_own_reader_gives_the_model_back(tmp_path: Path, tied: bool) -> None:
    model, tokenizer = made(tie_word_embeddings=tied), byte_level()
    told = secateur.export(model, None, tmp_path / "small.gguf", tokenizer=tokenizer)
    assert told["architecture"] == "llama" and told["bytes"] == (tmp_path / "small.gguf").stat().st_size
    (tmp_path / "back").mkdir()
    convert(tmp_path / "small.gguf", tmp_path / "back")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    ids = torch.tensor([tokenizer("the other").input_ids])
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert AutoTokenizer.from_pretrained(tmp_path / "back")("the other").input_ids == ids[0].tolist()


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
def test_transformers_reads_what_is_written(tmp_path: Path, kind: str) -> None:
    model = made(kind, **{"mistral": {"sliding_window": None}, "qwen3": {"head_dim": 128}}.get(kind, {}))
    # (of qwen3 transformers reads a head's width of 128 whatever the file says)
    export_gguf(model, tmp_path / "small.gguf", byte_level())
    again = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="small.gguf", dtype=torch.float32).eval()
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)


@pytest.mark.parametrize(
    ("dtype", "name"), [(torch.float32, "F32"), (torch.float16, "F16"), (torch.bfloat16, "BF16")]
)
def test_matrices_keep_their_bits_and_vectors_are_float32(
    tmp_path: Path, dtype: torch.dtype, name: str
) -> None:
    model = made(dtype=dtype)
    export_gguf(model, tmp_path / "small.gguf")
    fields, tensors = read(tmp_path / "small.gguf")
    assert fields["tokenizer.ggml.model"] == "none" and fields["llama.vocab_size"] == 261
    down = tensors["blk.1.ffn_down.weight"]
    assert down.tensor_type.name == name
    wanted = model.model.layers[1].mlp.down_proj.weight.detach().view(torch.uint8).numpy()
    assert np.array_equal(np.asarray(down.data).reshape(32, -1).view(np.uint8), wanted)
    norm = tensors["blk.1.attn_norm.weight"]
    assert norm.tensor_type.name == "F32"
    assert torch.equal(torch.tensor(norm.data), model.model.layers[1].input_layernorm.weight.detach().float())


def test_layers_that_differ_are_written_with_a_number_each(tmp_path: Path) -> None:
    model = made(num_attention_heads=8, num_key_value_heads=4, num_hidden_layers=3)
    graph = trace(model, {"input_ids": torch.arange(10)[None]})
    keep = {
        "model.layers.0.self_attn:kv_groups": torch.tensor([1, 3]),
        "model.layers.2.mlp:neurons": torch.arange(5, 16),
    }
    cut_units(model, graph, keep)
    told = export_gguf(model, tmp_path / "small.gguf", byte_level())
    assert told["architecture"] == "deci"
    fields, tensors = read(tmp_path / "small.gguf")
    layers = model.model.layers
    assert fields["deci.feed_forward_length"] == [layer.mlp.up_proj.out_features for layer in layers]
    assert fields["deci.attention.head_count_kv"] == [
        layer.self_attn.k_proj.out_features // 4 for layer in layers
    ]
    assert fields["deci.attention.head_count"] == [
        layer.self_attn.q_proj.out_features // 4 for layer in layers
    ]
    assert fields["deci.attention.key_length"] == 4
    assert fields["deci.feed_forward_length"] == [48, 48, 11] and fields["deci.attention.head_count"] == [
        4,
        8,
        8,
    ]
    for place, layer in enumerate(layers):
        rows = torch.tensor(tensors[f"blk.{place}.attn_k.weight"].data)
        heads = layer.self_attn.k_proj.out_features // 4
        assert torch.equal(rotary_to_halves(rows, heads), layer.self_attn.k_proj.weight.detach())


def test_norms_that_count_from_one_and_scaled_positions(tmp_path: Path) -> None:
    model = made("gemma", head_dim=8)
    export_gguf(model, tmp_path / "gemma.gguf")
    _, tensors = read(tmp_path / "gemma.gguf")
    own = model.model.layers[0].input_layernorm.weight.detach()
    assert torch.equal(torch.tensor(tensors["blk.0.attn_norm.weight"].data), own + 1)
    scaled = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}  # fmt: skip
    export_gguf(made(rope_parameters=scaled), tmp_path / "llama3.gguf")
    factors = read(tmp_path / "llama3.gguf")[1]["rope_freqs.weight"].data
    # wavelengths of width 8: 6.3, 63, 628, 6283; those above 32 / 1 are 8 times longer, those below 32 / 4 stay
    assert np.allclose(factors, [1, 8, 8, 8])


def test_a_tokenizer_with_bytes_behind_it_has_scores_in_the_order_of_its_merges(tmp_path: Path) -> None:
    tokenizer = with_bytes_behind()
    export_gguf(made(vocab_size=270, bos_token_id=1, eos_token_id=2, pad_token_id=0), tmp_path / "small.gguf", tokenizer)  # fmt: skip
    fields, _ = read(tmp_path / "small.gguf")
    tokens, scores, kinds = (fields[f"tokenizer.ggml.{name}"] for name in ("tokens", "scores", "token_type"))
    place = {token: n for n, token in enumerate(tokens)}
    assert fields["tokenizer.ggml.model"] == "llama" and fields["tokenizer.ggml.add_space_prefix"] is True
    assert scores[place["ab"]] == 0.0 > scores[place["▁ab"]] == -1.0 > scores[place["a"]]
    assert [kinds[place[t]] for t in ("<unk>", "<s>", "<0x41>", "ab", "[PAD269]")] == [2, 3, 6, 1, 5]
    assert len(tokens) == 270 and fields["tokenizer.ggml.bos_token_id"] == 1


def wordpiece() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordPiece({"[UNK]": 0}, unk_token="[UNK]"))
    )


def odd_split() -> PreTrainedTokenizerFast:
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


@pytest.mark.parametrize(
    ("make", "tokenizer", "match"),
    [
        (lambda: made("gpt_neox"), None, "there is no way to write a gpt_neox model"),
        (lambda: made("mistral", sliding_window=16), None, "reads no sliding window"),
        (lambda: made(hidden_act="relu"), None, "its activation is relu"),
        (lambda: made(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}), None, "scaled by yarn"),
        (lambda: made(vocab_size=200), byte_level, "the tokenizer has 260 tokens, the model 200"),
        (made, wordpiece, "reads no WordPiece tokenizer"),
        (made, odd_split, "no name for how its tokenizer splits text"),
        (lambda: made(dtype=torch.float64), None, "its weights are torch.float64"),
        (lambda: torch.nn.Linear(2, 2), None, "there is no way to write a Linear model"),
    ],
)  # fmt: skip
def test_what_a_file_cannot_hold_is_refused_before_anything_is_written(
    tmp_path: Path, make: Callable[[], Any], tokenizer: Callable[[], Any] | None, match: str
) -> None:
    model, given = make(), tokenizer() if tokenizer else None
    with pytest.raises(SecateurError, match=match):
        check_gguf(model, given)
    with pytest.raises(SecateurError, match=match):
        export_gguf(model, tmp_path / "small.gguf", given)
    assert not list(tmp_path.iterdir())


def test_layers_that_differ_where_one_width_is_read(tmp_path: Path) -> None:
    model = made("qwen2")
    keep = {"kinds": ("neurons",), "allocation": "global"}
    pruned = secateur.prune(model, method="group-magnitude", target="60%", **keep)  # type: ignore[arg-type]
    with pytest.raises(SecateurError, match="its layers differ, and llama.cpp's qwen2 reads one width"):
        export_gguf(pruned.model, tmp_path / "small.gguf")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", full)
    with pytest.raises(SecateurError, match="the disk is full; nothing was written"):
        export_gguf(made(), tmp_path / "small.gguf")
    assert not list(tmp_path.iterdir())


def test_from_the_command_line(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from secateur.cli.main import main

    out = tmp_path / "small.gguf"
    line = ["prune", str(tiny_folder), "--method", "group-magnitude", "--target", "80%", "--kinds", "neurons"]
    assert main([*line, "--out", str(out)]) == 0
    assert read(out)[0]["llama.feed_forward_length"] == 38
    assert main([*line, "--out", str(out)]) == 2
    assert "exists already" in capsys.readouterr().err
