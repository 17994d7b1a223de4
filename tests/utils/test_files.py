import errno
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from secateur.errors import SecateurError
from secateur.utils import files
from secateur.utils.files import (
    atomic_directory,
    atomic_file,
    atomic_write_bytes,
    atomic_write_json,
    atomic_write_text,
    require_data,
)


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_a_file_is_replaced_whole_and_nothing_else_is_left(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "plan.json"
    atomic_write_json(target, {"b": [1, None], "a": "é"})
    atomic_write_json(target, {"a": "é"})
    assert json.loads(target.read_text(encoding="utf-8")) == {"a": "é"}
    assert names(target.parent) == ["plan.json"]
    atomic_write_text(target, "a\r\nb\n")
    assert target.read_bytes() == b"a\r\nb\n"


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "x"
    atomic_write_bytes(target, b"old")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(SecateurError, match="disk is full") as error:
        atomic_write_bytes(target, b"new")
    assert str(target) in str(error.value)
    assert target.read_bytes() == b"old"
    assert names(tmp_path) == ["x"]


def test_whoever_may_read_other_files_may_read_these(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.touch()
    with atomic_file(tmp_path / "one.safetensors") as partial:
        save_file({"a": torch.ones(2)}, partial)
    with atomic_directory(tmp_path / "folder") as folder:
        (folder / "inner").mkdir()
        save_file({"a": torch.ones(2)}, folder / "inner" / "two.safetensors")
        (folder / "run.sh").touch(0o700)
    for name in ("one.safetensors", "folder/inner/two.safetensors"):
        assert (tmp_path / name).stat().st_mode == plain.stat().st_mode
    assert (tmp_path / "folder" / "run.sh").stat().st_mode & 0o100


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1, 2}])
def test_what_json_cannot_hold_is_refused(tmp_path: Path, value: object) -> None:
    with pytest.raises(SecateurError, match="JSON"):
        atomic_write_json(tmp_path / "x.json", {"v": value})
    assert names(tmp_path) == []


def test_a_folder_instead_of_a_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SecateurError, match="folder, not a file"):
        atomic_write_text(tmp_path, "x")


@pytest.mark.parametrize("exists", [False, True])
def test_a_directory_appears_whole(tmp_path: Path, exists: bool) -> None:
    target = tmp_path / "out"
    if exists:
        target.mkdir()
    with atomic_directory(target) as partial:
        (partial / "a").write_text("1")
        assert not target.exists() or names(target) == []
    assert (target / "a").read_text() == "1"
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("failure", [RuntimeError("boom"), KeyboardInterrupt()])
def test_a_failed_directory_leaves_nothing(tmp_path: Path, failure: BaseException) -> None:
    with pytest.raises(type(failure)), atomic_directory(tmp_path / "out") as partial:
        (partial / "a").write_text("1")
        raise failure
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    "failure",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_named(tmp_path: Path, failure: Exception) -> None:
    with pytest.raises(SecateurError, match="disk is full"), atomic_directory(tmp_path / "out"):
        raise failure
    assert names(tmp_path) == []


def test_a_forbidden_place_is_named(tmp_path: Path) -> None:
    with pytest.raises(SecateurError, match="cannot write here"), atomic_directory(tmp_path / "out"):
        raise PermissionError(errno.EACCES, "Permission denied")


def test_an_output_that_holds_something_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("1")
    (tmp_path / "file").write_text("1")
    for name, reason in (("full", "not empty"), ("file", "is a file")):
        with pytest.raises(SecateurError, match=reason), atomic_directory(tmp_path / name):
            pytest.fail("the block was entered")
    assert (tmp_path / "full" / "mine").read_text() == "1"


def test_a_directory_filled_meanwhile_is_kept(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with pytest.raises(SecateurError, match="meanwhile"), atomic_directory(target) as partial:
        (partial / "a").write_text("ours")
        target.mkdir()
        (target / "a").write_text("theirs")
    assert (target / "a").read_text() == "theirs"
    assert names(tmp_path) == ["out"]


def test_folders_follow_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "set").write_text("1")
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("SECATEUR_DATA", str(tmp_path))
    assert files.cache_dir() == tmp_path / "cache"
    assert files.data_dir() == tmp_path
    assert require_data("set") == tmp_path / "set"
    with pytest.raises(SecateurError, match=r"'other'.*SECATEUR_DATA"):
        require_data("other")
    monkeypatch.setenv("SECATEUR_DATA", str(tmp_path / "gone"))
    assert files.data_dir() is None
    with pytest.raises(SecateurError, match=r"SECATEUR_DATA=.*gone is not a folder"):
        require_data("set")
    monkeypatch.delenv("SECATEUR_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert files.cache_dir() == tmp_path / ".cache" / "secateur"
