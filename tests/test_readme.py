"""What the README shows runs as it stands, on tiny models under the names that it uses, and its links lead somewhere."""

import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from secateur.cli.main import main
from secateur.tasks.tiny import inputs_for, tiny_cnn, tiny_llama, tiny_llava

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
COMMANDS = re.findall(r"^(?:\$ )?secateur (.*)$", TEXT, re.MULTILINE)
SOURCE = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Source"]


def names(block: str) -> dict[str, Any]:
    """What a block takes for granted."""
    if "vlm" in block:
        vlm = tiny_llava().float()
        vlm.generation_config.max_new_tokens = 2
        return {"vlm": vlm, "inputs": inputs_for(vlm)}
    if "train_prune" in block:
        x, y = torch.randn(16, 3, 16, 16), torch.arange(16) % 5
        classifier = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 300))
        return {
            "net": tiny_cnn().float(),
            "x": x,
            "y": y,
            "classifier": classifier,
            "picture": x[0, :, :8, :8],
        }
    model = tiny_llama().float()
    ids = torch.randint(0, model.config.vocab_size, (6, 24))
    return {"model": model, "inputs": {"input_ids": ids[:1]}, "samples": ids}


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_a_snippet_runs(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    space = {"secateur": __import__("secateur"), **names(BLOCKS[number])}
    exec(compile(BLOCKS[number], f"README.md, snippet {number}", "exec"), space)  # noqa: S102  our own document


def test_all_snippets_were_found() -> None:
    assert len(BLOCKS) == 3 and len(COMMANDS) == 3


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_runs(
    command: str,
    tiny_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if ".onnx" in command:
        pytest.importorskip("onnxscript")
    monkeypatch.chdir(tmp_path)
    words = [{"smollm2": str(tiny_folder)}.get(word, word) for word in shlex.split(command)]
    assert main(words) == 0, capsys.readouterr().err


def test_links_are_whole_and_lead_somewhere() -> None:
    """A package index shows the README without the repository."""
    links = re.findall(r"\]\(([^)\s]+)\)", TEXT)
    assert len(links) > 20
    for link in links:
        where = re.fullmatch(rf"{re.escape(SOURCE)}/(?:blob|raw)/main/([^#]+)(#.*)?", link)
        assert where, f"{link} isn't a whole link into the repository"
        file = ROOT / where[1]
        assert file.is_file(), link
        if where[2]:
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert where[2][1:] in slugs, link
