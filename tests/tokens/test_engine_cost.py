"""Counts of tokens, FLOPs and bytes against sums done by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import inputs_for, make
from torch import Tensor

from secateur.families.vlm import Facts
from secateur.tokens.attach import attach
from secateur.tokens.cost import cache_bytes, layer_flops, llm_flops, tower_flops
from secateur.tokens.state import TokenSets


def half(sets: TokenSets) -> Tensor:
    keep = torch.zeros_like(sets.valid)
    keep[:, ::2] = True
    return keep


def test_published_figures() -> None:
    """Spec: transprune (3ndm, 32 layers of 4096 x 11008): dense 3.817 T, 576-504-360-72 tokens 1.557 T. Spec: fastv (2ndm): 0.52442."""
    llama = {"width": 4096, "inner": 11008}
    dense = 32 * layer_flops(576, **llama, gated=True)
    assert f"{dense / 1e12:.3f}" == "3.817"
    cut = [576] * 7 + [504] * 2 + [360] * 3 + [72] * 20
    assert f"{sum(layer_flops(n, **llama, gated=True) for n in cut) / 1e12:.3f}" == "1.557"
    ratio = (2 * layer_flops(576, **llama, gated=False) + 30 * layer_flops(288, **llama, gated=False)) / (
        32 * layer_flops(576, **llama, gated=False)
    )
    assert f"{ratio:.5f}" == "0.52442"


def test_a_layer_by_hand() -> None:
    # n 2, d 3, m 5: 4 * 2 * 9 + 2 * 4 * 3 + 2 * 2 * 3 * 5 = 72 + 24 + 60
    assert layer_flops(2, 3, 5, gated=False) == 156
    assert layer_flops(2, 3, 5, gated=True) == 186
    assert layer_flops(2, 3, 5, gated=True, kv_share=0.5) == 186 - 18
    facts = Facts(
        layers=2,
        hidden=3,
        intermediate=5,
        heads=4,
        kv_heads=2,
        gated=True,
        vision_hidden=3,
        vision_intermediate=5,
    )
    assert llm_flops([2, 2], facts) == 2 * 168
    assert tower_flops([4.0, 4.0], 2, facts) == 2 * 2 * 156


@pytest.mark.parametrize(
    ("at", "layers_cut"), [("input", 4), ("layer:1", 3), ("layer:3", 1), ("encoder:2", 4)]
)
def test_a_report(at: str, layers_cut: int) -> None:
    """Rows of 14+32, 11... tokens; half of 32 and of 16 visual tokens leave."""
    model, inputs = make("llava-clip", torch.float32), inputs_for("llava-clip", torch.float32)
    rows = inputs["attention_mask"].sum(1).tolist()
    with attach(model, half, at=at, target="50%", scope="crop") as attached:
        out = model.generate(**inputs, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
        report = attached.report
    before, after = report["before"], report["after"]
    assert before["visual_tokens"] == 48 and after["visual_tokens"] == 24
    assert (
        before["tokens_x_layers"] == 192
        and after["tokens_x_layers"] == 48 * (4 - layers_cut) + 24 * layers_cut
    )
    assert after["equivalent_tokens"] == after["tokens_x_layers"] / 4
    lengths = [rows] * (4 - layers_cut) + [[rows[0] - 16, rows[1] - 8, rows[2]]] * layers_cut
    assert report["lengths"] == lengths
    facts = attached.facts
    assert before["flops"] == sum(llm_flops([n] * 4, facts) for n in rows)
    assert after["flops"] == sum(llm_flops([layer[r] for layer in lengths], facts) for r in range(3))
    per_token = 2 * 2 * 8 * 4
    width = inputs["input_ids"].shape[1]
    assert before["kv_bytes"] == 3 * width * 4 * per_token
    assert after["kv_bytes"] == 3 * per_token * (width * (4 - layers_cut) + (rows[0] - 16) * layers_cut)
    assert cache_bytes(out.past_key_values) == after["kv_bytes"] + 3 * 4 * per_token * 2
    assert report["convention"] == "multiply-adds, 4nd^2 + 2n^2d + 3ndm"
    assert report["seconds_to_first_token"] > 0 and report["seconds_per_token"] > 0
    if at.startswith("encoder"):
        crops = [layer_tokens * 1.0 for layer_tokens in (51, 51, 27, 27)]
        assert before["tower_flops"] == tower_flops([51.0] * 4, 3, facts)
        assert after["tower_flops"] == tower_flops(crops, 3, facts)


def test_nothing_has_run_yet_and_nothing_left() -> None:
    model, inputs = make("llava-clip", torch.float32), inputs_for("llava-clip", torch.float32)
    with attach(model, lambda s: s.valid, target="50%") as attached:
        assert attached.report["before"] is None
        model(**inputs)
        report: dict[str, Any] = attached.report
    assert report["before"]["flops"] == report["after"]["flops"]
    assert report["before"]["kv_bytes"] == report["after"]["kv_bytes"] > 0
    with torch.no_grad(), attach(model, lambda s: ~s.valid, at="layer:2", target="50%") as attached:
        model(**inputs)
        assert attached.report["after"]["visual_tokens"] == 0
        assert attached.report["after"]["tokens_x_layers"] == 96
