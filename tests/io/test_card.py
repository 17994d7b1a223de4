"""The model card in every folder that holds a result: what it says is what the report says, and names are only text in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

import secateur
from secateur.cli.main import main
from secateur.io.card import card
from secateur.io.folder import prune_folder

PLAIN = {"form": "plain", "load": "AutoModelForCausalLM.from_pretrained(folder)", "why": None}
HOSTILE = "x\n---\nbase_model: evil/evil\nlicense: mit\n---\n# owned | <script>alert(1)</script> ![a](http://evil) `rm`"


def front(text: str) -> dict[str, Any]:
    """The front matter, as a hub reads it."""
    first, head, _ = text.split("---\n", 2)
    assert first == ""
    return yaml.safe_load(head)


def test_a_pruned_folder_says_what_was_measured_and_how_to_repeat_it(
    tiny_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    line = ["prune", str(tiny_folder), "--method", "group-magnitude", "--target", "50%", "--seqlen", "16"]
    assert main([*line, "--out", str(out)]) == 0
    text, report = (out / "README.md").read_text(), json.loads((out / "report.json").read_text())
    assert front(text) == {"library_name": "transformers", "tags": ["secateur", "pruned", "group-magnitude"]}
    before, after = report["before"]["params"], report["after"]["params"]
    assert after < before and f"| parameters | {before:,} | {after:,} |" in text
    assert f"```sh\n{report['command']}\n```" in text
    assert f"```python\n{report['artefact']['load']}\n```" in text
    assert "not this model's" in text


def test_what_python_and_shards_write_has_a_card_too(tiny_folder: Path, tmp_path: Path) -> None:
    prune_folder(tiny_folder, tmp_path / "shards", method="magnitude", target="50%")
    assert "`" not in front((tmp_path / "shards/README.md").read_text())["tags"]
    assert "method: magnitude" in (tmp_path / "shards/README.md").read_text()
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    pruned = secateur.prune(net, torch.randn(2, 8), method="group-magnitude", target="50%")
    pruned.save(tmp_path / "module")
    text = (tmp_path / "module/README.md").read_text()
    assert front(text)["library_name"] == "secateur" and "base model: Sequential" in text
    assert "runs the Python file of this folder" in text


def test_training_after_pruning_has_one(tiny_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "more"
    words = ["recover", str(tiny_folder), "--steps", "2", "--seqlen", "16", "--samples", "2", "--batch", "1"]
    assert main([*words, "--out", str(out)]) == 0
    text = (out / "README.md").read_text()
    assert "trained: 2 steps, loss" in text and "secateur recover" in text and "What was measured" not in text


def test_quality_is_in_the_table() -> None:
    report = {
        "model": "digits", "method": "lottery-ticket", "target": "20%", "met": False,
        "before": {"accuracy": {"digits": {"acc": 0.97}}}, "after": {"accuracy": {"digits": {"acc": 0.955}}},
    }  # fmt: skip
    text = card(report, PLAIN)
    assert "| accuracy, digits (acc) | 0.97 | 0.955 |" in text and "20%, not met" in text


@pytest.mark.parametrize("name", ["HuggingFaceTB/SmolLM2-135M", "smollm2", "./out/small", "/tmp/a/b"])
def test_only_the_name_of_a_hub_is_a_base_model(name: str) -> None:
    found = front(card({"model": name}, PLAIN))
    assert found.get("base_model") == (name if name.startswith("Hugging") else None)


def test_names_and_notes_are_only_text() -> None:
    report = {
        "model": HOSTILE, "method": HOSTILE, "target": HOSTILE, "source": HOSTILE, "notes": [HOSTILE],
        "before": {"perplexity": {HOSTILE: 1.5}}, "after": {"perplexity": {HOSTILE: float("nan")}},
        "command": "secateur prune 'a\n```\n# owned'",
    }  # fmt: skip
    text = card(report, {**PLAIN, "why": HOSTILE})
    assert front(text) == {
        "library_name": "transformers",
        "tags": ["secateur", "pruned", " ".join(HOSTILE.split())],
    }
    outside = text.split("````sh")[0].split("---\n", 2)[2]
    assert "<script" not in outside and "![" not in outside and "\n# owned" not in outside
    assert sum(line.startswith("# ") for line in outside.splitlines()) == 1
    row = next(line for line in outside.splitlines() if line.startswith("| perplexity"))
    assert row.replace("\\|", "").count("|") == 4 and row.endswith("| 1.5 | – |")
    assert text.count("````") == 2  # the longer fence holds the shorter one
