"""Every vision-language type of transformers: what the committed table says of it is what it does now.

A few types each time; `VLM_TYPES=all` runs all, `VLM_TYPES=i/n` every n-th from the i-th.
"""

from __future__ import annotations

import csv
import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from secateur.errors import SecateurError
from secateur.tokens.attach import attach

PATH = Path(__file__).parents[2] / "benchmarks" / "vlm_types.py"
SPEC = importlib.util.spec_from_file_location("vlm_types", PATH)
assert SPEC is not None and SPEC.loader is not None
bench: Any = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(bench)

with PATH.with_suffix(".csv").open() as file:
    TABLE = {row["type"]: row for row in csv.DictReader(file)}
QUICK = ["aya_vision", "cohere_compass", "ernie4_5_vl_moe", "exaone4_5", "gemma4", "glm4v_moe", "kosmos-2", "lfm3_vl",
         "mistral3", "molmo2", "qwen3_5", "qwen3_vl_moe", "video_llama_3", "vipllava"]  # fmt: skip
"""One of each way: experts, states, axes of rotary positions, forgotten positions, inputs for each layer, refused."""


def chosen() -> list[str]:
    which = os.environ.get("VLM_TYPES", "")
    if "/" in which:
        first, step = map(int, which.split("/"))
        return list(TABLE)[first::step]
    return list(TABLE) if which == "all" else QUICK


@pytest.mark.parametrize("kind", chosen())
def test_a_type_does_what_the_table_says(kind: str) -> None:
    if kind not in bench.types():
        pytest.skip("this transformers doesn't have it")
    threads = torch.get_num_threads()
    try:
        row = bench.judge(kind)
    finally:
        torch.set_num_threads(threads)
    if row["transformers"] != TABLE[kind]["transformers"]:
        # another version may refuse more, but nothing may be wrong
        assert "no" not in (row["keep_all"], row["input"], row["layer"]), row["reason"]
        return
    names = ("built", "family", "keep_all", "input", "layer", "places")
    assert {name: row[name] for name in names} == {name: TABLE[kind][name] for name in names}, row["reason"]


@pytest.mark.parametrize("kind", ["llava_next_video", "video_llava"])
@pytest.mark.parametrize("at", ["input", "layer:2"])
def test_pictures_and_videos_together(kind: str, at: str) -> None:
    """Two rows: a picture and a video of three frames, and a video alone."""
    model = bench.model_of(kind)
    noise = torch.randn(2, 3, 3, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    pictures = {name: value[:1] for name, value in bench.pictures_of(model, kind).items()}
    with torch.no_grad():
        still = len(bench.parts_of(bench.encoded(model, pictures), 1)[0])
        frames = bench.parts_of(model.base_model.get_video_features(noise, return_dict=True), 2)
        moving = sum(map(len, frames)) // 2
    image, video = (bench.placeholder(model, name) for name in ("image", "video"))
    rows = [[60, 70, *[image] * still, 71, *[video] * moving, 72, 90], [60, *[video] * moving, 72, 91, 92]]
    width = max(map(len, rows))
    inputs = {
        "input_ids": torch.tensor([[0] * (width - len(row)) + row for row in rows]),
        "attention_mask": torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows]),
        "pixel_values_videos": noise,
        **pictures,
    }
    full = bench.run(model, inputs)
    ids = inputs["input_ids"]
    none = torch.zeros_like(ids, dtype=torch.bool)
    assert torch.equal(bench.attached(model, inputs, at, none)[1], full[1])
    drawn = torch.rand(ids.shape, generator=torch.Generator().manual_seed(2)) < 0.5
    gone = drawn & ((ids == image) | (ids == video))
    number = 0 if at == "input" else 2
    layers = bench.decoder_of(model).layers
    words, logits = bench.greedy(model, inputs, lambda g: bench.hidden_from(layers, number, g), gone)
    found = bench.attached(model, inputs, at, gone)
    assert torch.equal(found[0], words) and (found[1] - logits).abs().max() < 1e-6
    assert (logits - full[1]).abs().max() > 1e-3


def test_prompts_longer_than_a_sliding_window(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exact between layers; at the input only with compact positions, which the proof on the first inputs mustn't refuse."""
    monkeypatch.setitem(bench.CHANGES, "mistral3", {"text_config": {"sliding_window": 8}})
    row = bench.judge("mistral3")
    assert (row["keep_all"], row["input"], row["layer"]) == ("yes", "refused", "yes"), row["reason"]
    assert "more than the sliding window of 8" in row["reason"]
    model = bench.model_of("mistral3")
    inputs = bench.inputs_of(model, "mistral3")
    for at in ("input", "layer:2"):
        with attach(
            model, lambda sets: sets.index % 2 == 0, at=at, target="50%", positions="compact"
        ) as attached:
            bench.run(model, inputs)
            assert len(attached.kept[at][0]) == 4


def test_a_method_that_reads_a_tower_nobody_knows_is_refused() -> None:
    with pytest.raises(SecateurError, match="blocks of this model's vision tower aren't known"):
        attach(bench.model_of("mistral3"), "fastervlm", target="50%")


def test_the_table_has_every_type() -> None:
    new = set(bench.types()) - set(TABLE)
    assert not new, f"run benchmarks/vlm_types.py for {', '.join(sorted(new))}"


def test_how_many_types_are_exact() -> None:
    rows = list(TABLE.values())
    assert sum(row["input"] == "yes" for row in rows) >= 60
    assert sum(row["layer"] == "yes" for row in rows) >= 45
    # whatever isn't exact says why
    assert all(row["reason"] for row in rows if row["input"] != "yes" or row["layer"] != "yes")
