"""Models that note things while they run: tables for the size of a picture, shapes that they have seen."""

import pytest
import torch
from torch import nn

import secateur


class Anchored(nn.Module):
    """Keeps its anchors, which are no buffer, for as long as pictures have the same size."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)
        self.seen: torch.Size | None = None
        self.width: int | None = None
        self.anchors = torch.empty(0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.head(self.body(x).relu()).flatten(2)
        if self.seen != x.shape:
            self.seen, self.width = x.shape, out.shape[2]
            self.anchors = torch.arange(out.shape[2], dtype=x.dtype)
            self.late = torch.ones(1)
        return out + self.anchors


@pytest.fixture
def picture() -> torch.Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def state(model: Anchored) -> tuple:
    return model.seen, model.width, model.anchors.numel(), hasattr(model, "late")


@pytest.mark.parametrize("inplace", [False, True])
def test_a_cut_leaves_no_state_of_its_runs(picture, inplace):
    model = Anchored()
    pruned = secateur.prune(model, picture, method="group-magnitude", target="50%", inplace=inplace)
    assert (pruned.model is model) == inplace
    assert pruned.model.body.out_channels == 4
    assert state(pruned.model) == state(model) == (None, None, 0, False)


def test_state_of_a_run_is_no_part_of_a_saved_model(picture, tmp_path):
    pruned = secateur.prune(Anchored(), picture, method="group-magnitude", target="50%")
    expected = pruned.model(picture)
    assert pruned.model.seen == picture.shape
    pruned.save(tmp_path / "out")
    again, _ = secateur.load(tmp_path / "out", model=Anchored())
    assert torch.equal(again(picture), expected)


def test_a_model_that_notes_shapes_is_exported_with_its_size_fixed(picture, tmp_path):
    pruned = secateur.prune(Anchored(), picture, method="group-magnitude", target="50%")
    found = secateur.export(pruned.model, picture, tmp_path / "out.pt2")
    assert found["open"] == {"x": []} and found["difference"] <= 1e-6
    assert state(pruned.model) == (None, None, 0, False)
