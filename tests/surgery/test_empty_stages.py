"""Blocks of a list that holds others too may all leave; a list never becomes empty."""

import copy

import pytest
import torch
from torch import nn

import secateur
from secateur.errors import SecateurError
from secateur.graph import trace
from secateur.io.artefact import save_model
from secateur.pruning.plan import Plan
from secateur.surgery import cut_units, mask_units, prove


class Block(nn.Module):
    """A residual block; with other widths in and out its input goes through a convolution, so it has to stay."""

    def __init__(self, wide, narrow):
        super().__init__()
        self.conv = nn.Conv2d(wide, narrow, 3, padding=1)
        self.beside = nn.Identity() if wide == narrow else nn.Conv2d(wide, narrow, 1)

    def forward(self, x):
        return self.beside(x) + torch.relu(self.conv(x))


class Stages(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.first = nn.Sequential(Block(4, 4), Block(4, 4))
        self.second = nn.Sequential(Block(4, 8), Block(8, 8), Block(8, 8))
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.second(self.first(self.stem(x))).mean((2, 3)))


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Stages().eval()


X = torch.randn(2, 1, 6, 6, generator=torch.Generator().manual_seed(1))
NONE = torch.tensor([], dtype=torch.int64)


def test_a_stage_keeps_the_block_that_changes_its_width(net):
    graph = trace(net, X)
    assert {name: graph[name].least for name in ("first:layers", "second:layers")} == {
        "first:layers": 1,
        "second:layers": 0,
    }
    keep = {"second:layers": NONE, "first:layers": torch.tensor([1])}
    assert prove(net, graph, keep, X) == {}
    expected = net.head(net.second[0](net.first[1](net.stem(X))).mean((2, 3)))
    masked = copy.deepcopy(net)
    mask_units(masked, graph, keep)
    torch.testing.assert_close(masked(X), expected)
    cut = copy.deepcopy(net)
    cut_units(cut, graph, keep)
    assert torch.equal(cut(X), expected) and (len(cut.first), len(cut.second)) == (1, 1)
    assert sum(p.numel() for p in cut.parameters()) == graph.params(keep)


def test_a_list_of_nothing_else_keeps_one(net):
    graph = trace(net, X)
    with pytest.raises(SecateurError, match="one at least"):
        cut_units(net, graph, {"first:layers": NONE})
    assert len(net.first) == 2


def test_prune_goes_to_the_last_block_and_its_plan_is_read_again(net, tmp_path):
    small = [
        p.numel()
        for name, p in net.named_parameters()
        if name.startswith(("stem", "first.0", "second.0", "head"))
    ]
    pruned = secateur.prune(
        copy.deepcopy(net),
        method="random-structured",
        target=f"params<={sum(small)}",
        kinds=("layers",),
        inputs=X,
    )
    assert pruned.plan.keep["second:layers"].tolist() == [] and len(pruned.plan.keep["first:layers"]) == 1
    pruned.plan.save(tmp_path)
    assert Plan.load(tmp_path) == pruned.plan
    again = copy.deepcopy(net)
    secateur.apply_plan(again, Plan.load(tmp_path))
    assert torch.equal(again(X), pruned.model(X))
    pruned.save(tmp_path / "saved")
    loaded, _ = secateur.load(tmp_path / "saved", model=copy.deepcopy(net))
    assert torch.equal(loaded(X), pruned.model(X))


def test_what_leaves_a_list_of_several_is_saved_without_a_dense_model(tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), Block(4, 4), Block(4, 4), nn.Flatten(), nn.Linear(144, 3)
    ).eval()
    plan = Plan(
        "by hand",
        "-",
        inputs=None,
        keep={"model:layers": torch.tensor([1])},
        sizes={"model:layers": 2},
        kinds={"model:layers": "layers"},
        beside={"model:layers": [0, 3, 4]},
    )
    pruned = copy.deepcopy(net)
    secateur.apply_plan(pruned, plan, inputs=X)
    expected = net[4](net[2](net[0](X)).flatten(1))
    assert torch.equal(pruned(X), expected)
    save_model(pruned, tmp_path, plan=plan)
    assert torch.equal(secateur.load(tmp_path, model=copy.deepcopy(net))[0](X), expected)
