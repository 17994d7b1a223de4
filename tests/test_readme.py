"""The snippets of the README run as they stand, on tiny models under the names that it uses."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from secateur.tasks.tiny import inputs_for, tiny_cnn, tiny_llama, tiny_llava

BLOCKS = re.findall(r"```python\n(.*?)```", (Path(__file__).parents[1] / "README.md").read_text(), re.DOTALL)


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
    assert len(BLOCKS) >= 4
