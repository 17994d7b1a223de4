"""The picture of a model's groups."""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from secateur.graph import trace
from secateur.report.graph import describe_groups, graph_html
from secateur.tasks.tiny import inputs_for, tiny_mixtral

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from chromium import Chromium, program


def test_coupled_parts_have_one_colour_and_frozen_ones_a_reason(tiny_llama: Callable[..., nn.Module]) -> None:
    graph = trace(tiny_llama(), {"input_ids": torch.zeros(1, 8, dtype=torch.long)})
    page = graph_html(graph, "tiny")
    groups = json.loads(re.search(r'id="groups">(.*?)</script>', page, re.DOTALL)[1])  # type: ignore[index]
    names = [entry[0] for entry in groups]
    picture = page.split("Layers, in order")[1]
    mlp = names.index("model.layers.0.mlp:neurons")
    marks = re.findall(rf'<span data-g="{mlp}" style="--color:([^"]+)"', picture)
    assert len(marks) == 3 and len(set(marks)) == 1, "gate, up and down, in one colour"
    embedding = next(entry for entry in groups if entry[0].startswith("model.embed_tokens"))
    assert embedding[-1] and embedding[-1].split("(")[0].strip() in page
    order = [picture.index(f'title="{name}"') for name in (
        "model.embed_tokens", "model.layers.0.mlp.up_proj", "model.layers.1.self_attn.q_proj", "model.norm", "lm_head",
    )]  # fmt: skip
    assert order == sorted(order)


@pytest.mark.skipif(program() is None, reason="Chromium isn't installed")
def test_a_group_is_found_and_pinned_by_keyboard(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    file = tmp_path / "groups.html"
    file.write_text(graph_html(trace(model, torch.ones(2, 4)), "two layers"))
    with Chromium() as browser:
        browser.open(file, 360, 740, dark=True)
        browser.value("document.querySelector('.swatch').focus()")
        told = browser.value("document.querySelector('#about').textContent")
        assert "0:neurons" in told and browser.value("document.querySelectorAll('.m.on').length") == 2
        browser.press("Enter")
        browser.value("document.activeElement.blur()")
        assert browser.value("document.querySelector('#about').textContent") == told, "pinned"
        browser.press("Escape")
        assert browser.value("document.querySelectorAll('.on').length") == 0
        assert browser.value("document.documentElement.scrollWidth") <= 360


def test_shares_of_a_network_counted_by_hand() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    found = describe_groups(trace(model, torch.ones(2, 4)))
    (inner,) = [group for group in found["groups"] if group["reason"] is None]
    assert found["params"] == 4 * 6 + 6 + 6 * 3 + 3
    assert found["macs"] == 2 * (4 * 6 + 6 * 3)
    assert inner["size"] == 6 and inner["tensors"] == 3
    assert inner["params"] == (24 + 6 + 18) / 51
    assert abs(inner["macs"] - 1.0) < 1e-9


def test_experts_of_which_two_are_picked_have_a_row() -> None:
    """The model refuses to run with fewer, so what leaves is counted down to two."""
    model = tiny_mixtral().float()
    found = describe_groups(trace(model, inputs_for(model)))
    experts = [group for group in found["groups"] if group["kind"] == "experts"]
    assert len(experts) == 4 and all(group["reason"] is None and group["size"] == 8 for group in experts)
