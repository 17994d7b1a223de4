"""The guide's commands run, in its order, on a tiny model in place of the one it names."""

import re
import shlex
from pathlib import Path

import pytest

from secateur.cli.main import main

GUIDE = (Path(__file__).parents[2] / "docs" / "guide.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", GUIDE, re.DOTALL)


def test_the_guide_runs(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path / "cache"))
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat and looked at the dog. " * 200)
    commands = [line for block in blocks("sh") for line in block.strip().splitlines()]
    assert len(commands) > 12
    for line in commands:
        program, *words = shlex.split(line)
        assert program == "secateur", line
        words = [{"smollm2": str(tiny_folder), "wikitext2": str(text)}.get(word, word) for word in words]
        assert main(words) == 0, f"{line}\n{capsys.readouterr().err}"
    assert {"small", "small.html", "groups.html", "recovered", "again"} <= {
        p.name for p in tmp_path.iterdir()
    }
    for block in blocks("python"):
        found: dict = {}
        exec(block, found)  # noqa: S102
        assert found["model"].num_parameters() == 28_960


def test_the_error_it_quotes(capsys: pytest.CaptureFixture[str]) -> None:
    command, message = re.findall(r"^\$ secateur (.*)\n(secateur: .*)$", GUIDE, re.MULTILINE)[0]
    assert main(shlex.split(command)) == 2
    said = capsys.readouterr().err
    assert said.startswith(message.split("; did you mean")[0]) and "wanda" in said
