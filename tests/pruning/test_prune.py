"""What a run reports of itself."""

import torch
from torch import Tensor, nn

import secateur


def test_a_pattern_that_not_every_layer_can_take_is_not_met():
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    report = secateur.prune(model, torch.randn(2, 6), method="magnitude", target="2:4").report
    assert report["met"] is False
    assert any("0.weight" in note and "6 inputs" in note for note in report["notes"])
    assert {row["name"]: row["kept"] for row in report["weights"]}["2.weight"] == 16


class Finder(nn.Module):
    """Rows that score above zero go on, as boxes do in a detector. Where x > 0, four small units take the score away."""

    def __init__(self) -> None:
        super().__init__()
        self.see, self.score, self.tell = nn.Linear(1, 8), nn.Linear(8, 1), nn.Linear(8, 64)
        with torch.no_grad():
            self.see.weight.copy_(torch.tensor([1.0] * 4 + [50.0] * 4)[:, None])
            self.see.bias.zero_()
            self.score.weight.copy_(torch.tensor([-1.0] * 4 + [0.0] * 4)[None])
            self.score.bias.fill_(1.0)
            self.tell.weight[:, :4].mul_(0.01)

    def forward(self, x: Tensor) -> Tensor:
        seen = self.see(x).relu()
        return self.tell(seen[self.score(seen)[:, 0] > 0])


def test_work_that_follows_from_values_is_told_apart_from_the_cut() -> None:
    """Half of 10 rows is found before, all of them after: 10 (4 + 4) + 10 * 4 * 64 multiply-adds of 10 (8 + 8) + 5 * 8 * 64."""
    x = torch.tensor([1.0, -1.0] * 5)[:, None]
    pruned = secateur.prune(Finder().eval(), x, method="group-magnitude", target="macs<=50%")
    report = pruned.report
    assert pruned.plan.keep["see:neurons"].tolist() == [4, 5, 6, 7]
    assert (report["before"]["macs"], report["after"]["macs"]) == (2720, 2640)
    told = next(note for note in report["notes"] if note.startswith("multiply-adds"))
    assert "97.1% of its multiply-adds as counted, 50.0% at the dense model's sizes" in told
