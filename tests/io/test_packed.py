"""Zeros that take a bit each: what is stored, what comes back to the bit, and what is refused."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import secateur
from secateur import SecateurError
from secateur.io import packed
from secateur.io.packed import pack, unpack, unpacked


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


def test_a_mask_and_the_values_by_hand() -> None:
    tensor = torch.tensor([[0.0, 1.0, 0.0, 0.0, -0.0, 0.0, 0.0, 0.0], [0.0] * 8])
    mask, values = pack(tensor)  # type: ignore[misc]
    assert mask.tolist() == [0b01001000, 0]  # minus zero has a bit that is set: it is a value
    assert values.tolist() == [1.0, 0.0] and torch.signbit(values).tolist() == [False, True]
    assert torch.equal(bits(unpacked(mask, values, [2, 8])), bits(tensor))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int8])
def test_every_dtype_comes_back_to_the_bit(dtype: torch.dtype) -> None:
    tensor = (torch.randn(7, 13) * 9).to(dtype)
    tensor[torch.rand(7, 13) < 0.7] = 0
    if tensor.is_floating_point():
        tensor[0, 0] = float("nan")
    parts = pack(tensor)
    assert parts is not None and torch.equal(bits(unpacked(*parts, [7, 13])), bits(tensor))
    assert parts[0].numel() == 12 and parts[1].dtype == dtype


def test_what_would_not_get_smaller_stays() -> None:
    assert pack(torch.ones(64)) is None and pack(torch.zeros(0)) is None
    almost = torch.ones(64)
    almost[:2] = 0  # 8 bytes of bits for two float32 zeros
    assert pack(almost) is None


@pytest.mark.parametrize(("target", "most"), [("50%", 0.75), ("2:4", 0.75), ("25%", 0.55)])
def test_a_pruned_model_is_smaller_on_disk_and_the_same(
    tiny_llama: Callable[..., Any], tmp_path: Path, target: str, most: float
) -> None:
    pruned = secateur.prune(tiny_llama(vocab_size=8), method="magnitude", target=target)
    pruned.save(tmp_path / "dense")
    pruned.save(tmp_path / "packed", packed=True)
    sizes = [sum(f.stat().st_size for f in (tmp_path / n).glob("*.safetensors") if f.name != "plan.safetensors") for n in ("dense", "packed")]  # fmt: skip
    told = json.loads((tmp_path / "packed/report.json").read_text())["artefact"]["packed"]
    assert told == {"bytes": sizes[1], "dense_bytes": sizes[0]} and sizes[1] < most * sizes[0]
    model, _ = secateur.load(tmp_path / "packed")
    unpack(tmp_path / "packed", tmp_path / "again")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    for name, value in pruned.model.state_dict().items():
        assert torch.equal(bits(model.state_dict()[name]), bits(value))
        assert torch.equal(bits(plain.state_dict()[name]), bits(value))
    names = {file.name for file in (tmp_path / "dense").iterdir()}
    assert {file.name for file in (tmp_path / "again").iterdir()} == names
    assert not list((tmp_path / "packed").glob("model*"))


def test_what_is_damaged_or_in_use_is_refused(tiny_llama: Callable[..., Any], tmp_path: Path) -> None:
    pruned = secateur.prune(tiny_llama(), method="magnitude", target="30%")
    pruned.save(tmp_path / "packed", packed=True)
    with pytest.raises(SecateurError, match="the folder is not empty"):
        unpack(tmp_path / "packed", tmp_path / "packed")
    with pytest.raises(SecateurError, match="it isn't packed"):
        unpack(tmp_path, tmp_path / "out")
    file = tmp_path / "packed/packed.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith(".values"))
    save_file({**tensors, name: tensors[name][1:]}, file, {"format": "pt"})
    for attempt in (lambda: secateur.load(tmp_path / "packed"), lambda: unpack(tmp_path / "packed", tmp_path / "out")):  # fmt: skip
        with pytest.raises(SecateurError, match=r"it is damaged \(\d+ bits and \d+ values\)"):
            attempt()
    assert not (tmp_path / "out").exists()


def test_a_full_disk_leaves_nothing(
    tiny_llama: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pruned = secateur.prune(tiny_llama(), method="magnitude", target="30%")

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(packed, "save_file", full)
    with pytest.raises(SecateurError, match="the disk is full; nothing was written"):
        pruned.save(tmp_path / "packed", packed=True)
    assert not list(tmp_path.iterdir())


def test_from_the_command_line(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from secateur.cli.main import main

    line = ["prune", str(tiny_folder), "--method", "magnitude", "--target", "30%", "--packed"]
    assert main(line) == 2 and "--packed: it is for a folder" in capsys.readouterr().err
    assert main([*line, "--out", str(tmp_path / "small")]) == 0
    assert main(["unpack", str(tmp_path / "small"), "--out", str(tmp_path / "dense")]) == 0
    assert (tmp_path / "dense/model.safetensors").is_file()
