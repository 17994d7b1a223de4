"""What a run reports of itself."""

import torch
from torch import nn

import secateur


def test_a_pattern_that_not_every_layer_can_take_is_not_met():
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    report = secateur.prune(model, torch.randn(2, 6), method="magnitude", target="2:4").report
    assert report["met"] is False
    assert any("0.weight" in note and "6 inputs" in note for note in report["notes"])
    assert {row["name"]: row["kept"] for row in report["weights"]}["2.weight"] == 16
