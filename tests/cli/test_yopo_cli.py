"""`secateur tokens --method yopo`: a target, a plan's file, and refusals without a traceback."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from secateur.attention.work import VisualWork
from secateur.cli.main import main

SCENES: dict[str, Any] = {"layers": 4, "heads_each": 4, "neurons_each": 384}
ASK = ["tokens", "scenes", "--image", "3", "--repeats", "1", "--json"]


def test_a_target_and_a_plan_of_a_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main([*ASK, "--method", "yopo", "--target", "25%"]) == 0
    found = json.loads(capsys.readouterr().out)
    work = found["visual_flops"]
    # all heads stay without ratios; what neurons and layers leave is a quarter of 4d^2 + 3dm, and all of 2nd
    assert 0.24 < work["left"] / work["dense"] < 0.29 and work["heads"] == 0
    VisualWork(**SCENES, neurons=(0, 96, 192, 384), cut=3).save(tmp_path / "work.json")
    for method, kept in (("yopo", 0), ("divprune", 0)):
        given = ["--method", method, "--work", str(tmp_path / "work.json")]
        assert main([*ASK, *given]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["after"]["visual_tokens"] == kept and found["visual_flops"]["neurons"] > 0


@pytest.mark.parametrize(
    ("match", "given"),
    [
        ("has no middle", ["--window", "4"]),
        ("larger than all that a grid of 8 x 8", ["--window", "17"]),
        ("must be seen on prompts", ["--heads", "0.5"]),
        ("a target says", ["--heads", "0.5", "--target", "50%"]),
        ("no such file", ["--work", "none.json"]),
        ("layers", ["--work", "wrong.json"]),
    ],
)
def test_nonsense_ends_in_one_line(
    match: str, given: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    VisualWork(2, 4, 384, cut=1).save("wrong.json")
    assert main([*ASK, "--method", "yopo", *given]) == 2
    said = capsys.readouterr()
    assert match in said.err and "Traceback" not in said.err
