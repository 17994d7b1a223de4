"""`secateur demo`: the page says what the commands gave, needs nothing beside it, and what is missing has a name."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from secateur.cli import demo
from secateur.cli.main import main
from secateur.report.demo import demo_html
from secateur.saliency.picture import save_png
from secateur.utils.spread import Speed


def ran(folder: Path) -> dict[str, Any]:
    """What the three commands could have given."""
    for name in ("kept.png", "saliency.png"):
        save_png(torch.zeros(8, 8, 3, dtype=torch.uint8), folder / name)
    speed = {"forward_seconds": Speed.of([2.0, 2.1, 1.9] * 2, [1.0, 1.0, 1.1] * 2).as_dict()}
    side = {"params": 100, "perplexity": {"english": 20.5}, "latency": {"forward_seconds": 2.0}}
    language = {
        "method": "2ssp", "target": "90%", "command": "secateur prune small --target 90%", "before": side,
        "after": {**side, "params": 92}, "speed": speed, "report": str(folder / "report.html"), "notes": ["a note"],
        "prompts": ["The capital is"], "answers": {"before": [" Paris."], "after": ["<script>alert(1)</script>"]},
    }  # fmt: skip
    tokens = {
        "method": "divprune", "prompt": "what colour ?", "expected": "red", "command": "secateur tokens scenes",
        "before": {"answer": "red", "visual_tokens": 64}, "after": {"answer": "red", "visual_tokens": 16},
        "out": str(folder / "kept.png"),
    }  # fmt: skip
    saliency = {
        "method": "normgrad", "target": 985, "name": "daisy", "likeliest": [{"class": 985, "probability": 0.91}],
        "command": "secateur saliency net photo.jpg", "out": str(folder / "saliency.png"),
    }  # fmt: skip
    return {
        "language": language, "tokens": tokens, "saliency": saliency, "seconds": 200.0, "versions": {"secateur": "1"},
    }  # fmt: skip


def test_the_page_holds_answers_figures_and_pictures(tmp_path: Path) -> None:
    page = demo_html(ran(tmp_path), tmp_path)
    assert "Paris." in page and "<script" not in page and "&lt;script&gt;" in page
    assert "92.0 %" in page and "× as fast" in page and "a note" in page
    assert "with all 64 visual tokens" in page and "with the 16 that divprune kept" in page
    assert "daisy (91 %)" in page and '<a href="report.html">' in page
    pictures = re.findall(r'<img src="([^"]{40})[^"]*" alt="([^"]+)"', page)
    assert [source.split(";")[0] for source, _ in pictures] == ["data:image/png", "data:image/jpeg"]
    assert not re.findall(r'(?:src|href)="(?!data:|#|report\.html)', page), (
        "it needs no network and no other file"
    )


def test_a_part_that_needs_an_extra_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "_has", lambda name: name != "timm")
    missing = demo._saliency(tmp_path, "efficientnet-lite0", quick=False)
    assert missing == {"missing": "it needs timm: pip install 'secateur[timm,digits]'"}
    page = demo_html({**ran(tmp_path), "saliency": missing}, tmp_path)
    assert "Not drawn: it needs timm" in page and page.count("<img") == 1


def test_a_command_that_fails_is_named_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "_tiny", lambda out: (str(out / "nothing"), ""))
    assert main(["demo", "--quick", "--out", str(tmp_path / "demo")]) == 2
    said = capsys.readouterr().err
    assert "secateur prune" in said and "no such folder" in said and "log.txt" in said


@pytest.mark.slow
def test_a_quick_one_from_end_to_end(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("timm")
    pytest.importorskip("sklearn")
    out = tmp_path / "demo"
    assert main(["demo", "--quick", "--out", str(out), "--json"]) == 0
    seen = capfd.readouterr()
    found = json.loads(seen.out)
    page = (out / "index.html").read_text()
    assert page.count("<img") == 2
    assert found["language"]["after"]["params"] < found["language"]["before"]["params"]
    assert found["tokens"]["after"]["visual_tokens"] == 16
    assert (out / "report.html").is_file() and (out / "smaller/README.md").is_file()
    assert all(line.startswith("$ ") for line in seen.err.splitlines()), (
        "nothing of other libraries on the screen"
    )
