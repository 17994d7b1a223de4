"""The commands and snippets of docs/cnn.md run in its order."""

import re
import shlex
from pathlib import Path

import pytest
import torch

from secateur.cli.main import main

GUIDE = (Path(__file__).parents[2] / "docs" / "cnn.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_commands_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnxscript")
    monkeypatch.chdir(tmp_path)
    lines = [
        line for block in re.findall(r"```sh\n(.*?)```", GUIDE, re.DOTALL) for line in block.splitlines()
    ]
    commands = [shlex.split(line)[1:] for line in lines if line.startswith("secateur ")]
    assert len(commands) == 3 and len(lines) == 4
    for words in commands:
        assert main(words) == 0, f"{words}\n{capsys.readouterr().err}"
    assert (tmp_path / "smaller.onnx").stat().st_size < (tmp_path / "small.onnx").stat().st_size


@pytest.mark.slow
def test_the_snippets_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxscript")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    space = {"images": torch.randn(16, 3, 32, 32), "labels": torch.arange(16) % 10}
    for block in re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL):
        exec(block.replace("steps=20", "steps=1").replace('"resnet18"', '"resnet10t"'), space)  # noqa: S102  our own document
    assert space["pruned"].report["met"] and (tmp_path / "resnet18-trained.onnx").is_file()
