"""Isomorphic pruning: which sub-structures are alike, a ranking by hand, and the released rule on random networks."""

import torch
import torch.nn.functional as F
from torch import nn

import secateur
from secateur.graph import trace
from secateur.methods.isomorphic import structure


def by_hand():
    """Channels of scores 5 and 5; neurons of 4, 5, 10, 2 and of 1, 2, 5, 8, which are isomorphic."""
    net = nn.Sequential(
        nn.Conv2d(1, 2, 1), nn.Flatten(), nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 1)
    )  # fmt: skip
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[[[1.0]]], [[[1.0]]]]))
        net[2].weight.copy_(torch.tensor([[3, 0], [0, 2], [3, 0], [0, 1]]).float().div(3**0.5))
        net[4].weight.copy_(torch.diag(torch.tensor([1.0, 1, 1, 1])))
        net[6].weight.copy_(torch.tensor([[0.0, 1.0, 2.0, 3.0]]))
    return net


def test_a_ranking_by_hand():
    """Squares, summed over what is coupled, over their mean: the first neurons score 4, 7/3, 4, 4/3 (mean 35/12), the
    second 1, 2, 5, 10 (mean 4.5). Divided: 1.37, 0.80, 1.37, 0.46 and 0.22, 0.44, 1.11, 2.22. The channels, squared, 7 and
    8/3 (mean 29/6): 1.45 and 0.55. Half of ten units: one channel, and the four lowest of eight neurons."""
    net = by_hand()
    pruned = secateur.prune(net, torch.ones(2, 1, 1, 1), method="isomorphic", target="50%", criterion="l2")
    assert pruned.plan.keep["0:channels"].tolist() == [0]
    assert pruned.plan.keep["2:neurons"].tolist() == [0, 2]
    assert pruned.plan.keep["4:neurons"].tolist() == [2, 3]
    # one ranking over all takes the four neurons and the channel of 0.55 too, but at 40 % it spares the channel's likes
    mixed = secateur.prune(net, torch.ones(2, 1, 1, 1), method="spa", target="70%", criterion="l2")
    own = secateur.prune(net, torch.ones(2, 1, 1, 1), method="isomorphic", target="70%", criterion="l2")
    assert "0:channels" not in mixed.plan.keep and "0:channels" not in own.plan.keep
    assert mixed.plan.keep["4:neurons"].tolist() == own.plan.keep["4:neurons"].tolist() == [2, 3]


class Residual(nn.Module):
    def __init__(self, width: int, inner: int):
        super().__init__()
        self.down, self.up = nn.Conv2d(width, inner, 3, padding=1), nn.Conv2d(inner, width, 3, padding=1)

    def forward(self, x):
        return x + self.up(torch.relu(self.down(x)))


def network():
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), Residual(8, 16), Residual(8, 4), nn.AvgPool2d(4), nn.Flatten(), nn.Linear(8, 5)
    )  # fmt: skip


def test_structures_are_compared_without_their_sizes():
    net = network()
    graph = trace(net, torch.randn(2, 3, 4, 4))
    found = {group.name: structure(net, group) for group in graph.prunable(("channels", "hidden"))}
    assert (
        found["1:channels"]
        == found["2:channels"]
        == "channels: Conv2d.bias vector, Conv2d.weight in, Conv2d.weight out"
    )
    stream = next(text for name, text in found.items() if name not in ("1:channels", "2:channels"))
    assert "3 x Conv2d.weight out" in stream and "Linear.weight in" in stream


def test_the_released_rule_on_random_pictures():
    """|w·g| summed over each layer's share of a unit, averaged over layers, over the group's mean; one threshold for each
    structure, at which a given part of its units is gone."""
    net = network()
    x, y = torch.randn(24, 3, 4, 4), torch.arange(24) % 5
    batches = [(x[:12], y[:12]), (x[12:], y[12:])]
    for pictures, labels in batches:
        F.cross_entropy(net(pictures), labels).backward()
    taylor = {name: (p * p.grad).abs() for name, p in net.named_parameters()}
    net.zero_grad()

    def importance(makes, reads):
        parts = [taylor[name].flatten(1).sum(1) for name in makes]
        parts += [taylor[name].transpose(0, 1).flatten(1).sum(1) for name in reads]
        mean = torch.stack(parts).mean(0)
        return mean / mean.mean()

    inner = [importance([f"{i}.down.weight"], [f"{i}.up.weight"]) for i in (1, 2)]
    stream = importance(
        ["0.weight", "1.up.weight", "2.up.weight"], ["1.down.weight", "2.down.weight", "5.weight"]
    )
    kept = []
    for structures in (inner, [stream]):
        every = torch.cat(structures)
        threshold = every.topk(len(every) - int(len(every) * 0.75), largest=False).values[-1]
        kept += [(scores > threshold).nonzero().flatten().tolist() for scores in structures]
    pruned = secateur.prune(net, x[:2], method="isomorphic", target="75%", data=batches)
    keep = {name: units.tolist() for name, units in pruned.plan.keep.items()}
    own = [
        next((units for name, units in keep.items() if name.startswith(f"{i}:")), list(range(n)))
        for i, n in ((1, 16), (2, 4))
    ]
    other = next(units for name, units in keep.items() if not name.startswith(("1:", "2:")))
    assert [*own, other] == kept
