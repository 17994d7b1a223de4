"""Text of data sets that `datasets` reads, and text that is piped in."""

import io
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from secateur.data import text
from secateur.data.text import load_text
from secateur.errors import SecateurError

ROWS = [{"text": "one", "number": 1}, {"text": "  ", "number": 2}, {"text": "three", "number": 3}]


@pytest.mark.parametrize("source", ["hf:", "hf:name", "hf:name:train", "hf:name::text", "hf:a:b:c:d:e"])
def test_another_form_is_refused_with_the_form(source: str) -> None:
    with pytest.raises(SecateurError, match="write hf:NAME:SPLIT:FIELD"):
        load_text(source)


def test_without_datasets_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(SecateurError, match=r"pip install 'secateur\[datasets\]'"):
        load_text("hf:wikitext:train:text")


def test_rows_of_a_folder_are_read_in_order(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list(ROWS)
    rows.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": rows, "test": rows.select([0])}).save_to_disk(str(tmp_path / "many"))
    (tmp_path / "files").mkdir()
    rows.to_json(str(tmp_path / "files" / "train.jsonl"))
    for name in ("one", "many", "files"):
        assert load_text(f"hf:{tmp_path / name}:train:text") == "one\n\nthree"
    assert load_text(f"hf:{tmp_path / 'many'}:test:text") == "one"
    for source, said in [
        (f"hf:{tmp_path / 'many'}:tets:text", "did you mean test"),
        (f"hf:{tmp_path / 'many'}:test:txt", "did you mean text"),
        (f"hf:{tmp_path / 'many'}:test:number", "row 0 of number is a int, no text"),
        (f"hf:{tmp_path / 'nothing'}:test:text", "no such folder"),
    ]:
        with pytest.raises(SecateurError, match=said):
            load_text(source)


def test_a_stream_is_read_once_and_a_terminal_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    text._piped.cache_clear()
    stream = SimpleNamespace(isatty=lambda: False, buffer=io.BytesIO(b"piped in"))
    monkeypatch.setattr(sys, "stdin", stream)
    assert (load_text("-"), load_text("-")) == ("piped in", "piped in")
    text._piped.cache_clear()
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
    with pytest.raises(SecateurError, match="nothing is piped in"):
        load_text("-")
