"""The gallery's parts run, small; its page shows what they wrote, and what is committed is there and light."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
import gallery

from secateur.tasks.tiny import inputs_for, tiny_cnn, tiny_llama


def test_kept_tokens_are_drawn_and_a_method_that_cannot_says_why(tmp_path: Path) -> None:
    lines = "\n".join(gallery.tokens(tmp_path, ["divprune", "covipal"]))
    assert (tmp_path / "tokens.png").stat().st_size > 1000
    assert "Not drawn: `covipal`" in lines and "`divprune` (" not in lines


def test_groups_are_boxes_with_names(tmp_path: Path) -> None:
    cnn, llama = tiny_cnn().float(), tiny_llama().float()
    models = {"a <cnn>": (cnn, inputs_for(cnn)), "llama": (llama, inputs_for(llama))}
    gallery.groups(tmp_path, models)
    drawn = (tmp_path / "groups.svg").read_text()
    assert "a &lt;cnn&gt;" in drawn and "model.layers.0.mlp:neurons: " in drawn
    assert drawn.count("<rect") > 10 and drawn.count("<rect") - 1 == drawn.count("<title>")


def test_maps_stand_side_by_side(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.LazyLinear(5))
    net(torch.zeros(1, 3, 32, 32))
    gallery.maps(tmp_path, net.eval(), ["grad-cam", "gradient"], side=32, target=None)
    from PIL import Image

    assert Image.open(tmp_path / "saliency.jpg").width == 12 + 3 * (32 + 12)


def test_the_front_is_what_nothing_beats() -> None:
    points = [(0.8, 0.9, "a"), (0.6, 0.7, "b"), (0.7, 0.6, "c"), (0.6, 0.5, "d"), (0.9, 0.9, "e")]
    assert gallery.front(points) == [(0.6, 0.7, "b"), (0.8, 0.9, "a")]


def test_the_plot_has_a_point_for_every_line(tmp_path: Path) -> None:
    lines = "\n".join(gallery.pareto(tmp_path))
    drawn = (tmp_path / "pareto.svg").read_text()
    assert drawn.count("stroke-dasharray") == 4 and drawn.count("<circle") > 40
    assert "secateur compare digits --cost macs" in lines


def test_digits_and_texts_before_and_after(tmp_path: Path, tiny_folder: Path) -> None:
    pytest.importorskip("sklearn")
    gallery.digits(tmp_path, count=3, steps=2)
    assert (tmp_path / "digits.png").is_file()
    lines = gallery.texts(tmp_path, str(tiny_folder), [("magnitude", "50%")], words=3)
    assert sum("| `magnitude`, 50% of the weights kept |" in line for line in lines) == len(gallery.PROMPTS)
    assert all(line.count("|") - line.count("\\|") == 3 for line in lines if line.startswith("|"))


def test_a_part_is_written_anew_and_the_others_stay(tmp_path: Path) -> None:
    file = tmp_path / "gallery.md"
    gallery.page(file, {"pareto": ["old plot"], "tokens": ["old tokens"]})
    gallery.page(file, {"pareto": ["new plot"]})
    text = file.read_text()
    assert "new plot" in text and "old plot" not in text
    assert text.index("old tokens") < text.index("new plot")


def test_the_committed_pictures_are_those_of_the_page_and_light() -> None:
    folder = ROOT / "docs" / "gallery"
    shown = set(
        re.findall(r"\(gallery/([\w.-]+)\)", (ROOT / "docs" / "gallery.md").read_text(encoding="utf-8"))
    )
    there = {file.name for file in folder.iterdir()}
    assert shown == there and len(shown) >= 5
    assert sum(file.stat().st_size for file in folder.iterdir()) < 1.5e6
