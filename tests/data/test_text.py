import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from secateur.data.text import SETS, calibration, context, encode, load_calibration, load_text, sample_from
from secateur.errors import SecateurError


class Letters:
    """A tokenizer of one token a character: its code; special tokens put 1 in front."""

    def __call__(self, text: str, add_special_tokens: bool = True, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [1] * add_special_tokens + [ord(c) for c in text]}


TEXT = "".join(chr(97 + i % 26) for i in range(200))


def test_windows_are_slices_of_the_text_and_follow_the_seed() -> None:
    windows = calibration(Letters(), TEXT, samples=50, seqlen=30, seed=3)
    assert windows.shape == (50, 30)
    assert windows.dtype == torch.int64
    texts = ["".join(map(chr, row)) for row in windows.tolist()]
    assert all(text in TEXT for text in texts)
    assert len(set(texts)) > 10
    assert torch.equal(windows, calibration(Letters(), TEXT, 50, 30, seed=3))
    assert not torch.equal(windows, calibration(Letters(), TEXT, 50, 30, seed=4))


def test_every_window_can_be_drawn() -> None:
    assert set(calibration(Letters(), "abcd", samples=100, seqlen=3)[:, 0].tolist()) == {97, 98}
    assert calibration(Letters(), "abcd", samples=2, seqlen=4).tolist() == [[97, 98, 99, 100]] * 2


@pytest.mark.parametrize(
    ("text", "samples", "seqlen", "reason"),
    [
        ("", 1, 4, "empty"),
        ("  \n", 1, 4, "empty"),
        ("abc", 1, 4, r"3 tokens, fewer than one window of 4.*at most 3"),
        ("abcdef", 0, 4, "0 windows"),
        ("abcdef", 2, 0, "of 0 tokens"),
    ],
)
def test_text_that_gives_no_window_is_refused(text: str, samples: int, seqlen: int, reason: str) -> None:
    with pytest.raises(SecateurError, match=reason):
        calibration(Letters(), text, samples, seqlen)


def test_the_default_text_is_english_that_every_machine_has() -> None:
    text = load_text()
    assert len(text) > 300_000
    assert "Lambda expressions" in text
    assert text == load_text()


def test_files_are_read_by_their_endings(tmp_path: Path) -> None:
    lines = "\n".join(json.dumps({"text": t}) for t in ("one é", "two")) + "\n\n"
    (tmp_path / "a.txt").write_text("plain é", encoding="utf-8")
    (tmp_path / "a.txt.xz").write_bytes(lzma.compress("packed é".encode()))
    (tmp_path / "a.jsonl").write_text(lines, encoding="utf-8")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    assert load_text(tmp_path / "a.txt") == "plain é"
    assert load_text(str(tmp_path / "a.txt.xz")) == "packed é"
    assert load_text(tmp_path / "a.jsonl") == load_text(tmp_path / "a.jsonl.gz") == "one é\n\ntwo"


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.txt", b" \n", "the text is empty"),
        ("a.txt", b"\xff\xfe\x00", "cannot be read as UTF-8"),
        ("a.txt.xz", b"not packed", "cannot be read"),
        ("a.jsonl", b'{"text": "x"}\n{"texts": "y"}\n', "line 2"),
        ("a.jsonl", b"nonsense", "line 1"),
        ("a.jsonl", b'{"text": 3}', "line 1"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, name: str, content: bytes, reason: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SecateurError, match=reason) as error:
        load_text(tmp_path / name)
    assert str(tmp_path / name) in str(error.value)


def test_an_unknown_name_lists_what_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SecateurError, match=r"wikitext3.*wikitext2"):
        load_text("wikitext3")
    monkeypatch.setenv("SECATEUR_DATA", str(tmp_path))
    with pytest.raises(SecateurError, match="SECATEUR_DATA"):
        load_text("wikitext2")


@pytest.mark.needs_data
def test_the_named_sets_are_what_their_readme_says() -> None:
    sizes = {name: len(load_text(name).encode()) for name in SETS}
    assert sizes["wikitext2"] == 1_121_681
    assert sizes["ptb"] == 399_782
    assert sizes["moby_dick"] == 1_234_540


class Counter(nn.Module):
    """After token t comes t + 1 (mod 10), with certainty; no cache."""

    def __init__(self, bos: int | None = None):
        super().__init__()
        self.config = SimpleNamespace(vocab_size=10, bos_token_id=bos, eos_token_id=None)
        self.table = nn.Parameter(torch.eye(10).roll(1, 1) * 1000)

    def forward(self, input_ids: torch.Tensor, past_key_values: Any = None, use_cache: bool = True) -> Any:
        return SimpleNamespace(logits=self.table[input_ids])


def test_a_model_writes_its_own_text() -> None:
    assert sample_from(Counter(bos=7), samples=2, seqlen=5).tolist() == [[7, 8, 9, 0, 1]] * 2
    rows = sample_from(Counter(), samples=30, seqlen=3, batch=8)
    assert rows.shape == (30, 3)
    assert torch.equal((rows[:, :1] + torch.arange(3)) % 10, rows)
    assert len(set(rows[:, 0].tolist())) > 3


def test_sampling_follows_the_seed_the_cache_and_leaves_the_mode(
    tiny_llama: Callable[..., nn.Module],
) -> None:
    model = tiny_llama().train()
    rows = sample_from(model, samples=3, seqlen=12, seed=1)
    assert model.training
    assert rows.shape == (3, 12)
    assert torch.equal(rows, sample_from(model, samples=3, seqlen=12, seed=1))
    assert not torch.equal(rows, sample_from(model, samples=3, seqlen=12, seed=2))
    plain = model.forward
    model.forward = lambda input_ids, past_key_values, use_cache: SimpleNamespace(
        logits=plain(input_ids).logits
    )
    assert torch.equal(rows, sample_from(model, samples=3, seqlen=12, seed=1))


def test_what_data_means(tiny_llama: Callable[..., nn.Module], tmp_path: Path) -> None:
    model = tiny_llama()
    (tmp_path / "t.txt").write_text(TEXT)
    assert load_calibration(model, Letters(), tmp_path / "t.txt", 3, 1000).shape == (3, 64), (
        "cut to the context"
    )
    assert load_calibration(model, None, "self", 2, 8).shape == (2, 8)
    assert load_calibration(model, Letters(), None, 2, 8).shape == (2, 8)
    with pytest.raises(SecateurError, match="no tokenizer"):
        load_calibration(model, None, None, 2, 8)
    with pytest.raises(SecateurError, match="Linear"):
        load_calibration(nn.Linear(2, 2), None, "self", 2, 8)
    assert context(model) == 64
    assert context(nn.Linear(2, 2)) is None


def test_special_tokens_only_where_asked() -> None:
    assert encode(Letters(), "ab").tolist() == [97, 98]
    assert encode(Letters(), "ab", special=True).tolist() == [1, 97, 98]
