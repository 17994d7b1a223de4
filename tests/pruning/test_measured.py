"""`allocation="measured"`: budgets of units by what predictions lose, beside a brute force and worked out by hand."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

import secateur
from secateur.errors import SecateurError
from secateur.graph.blocks import every_matrix
from secateur.pruning.allocate import Competitor
from secateur.pruning.measured import _slopes, by_what_is_lost

IDS = torch.randint(64, (8, 16), generator=torch.Generator().manual_seed(1))


def kept(pruned: Any) -> list[int]:
    return [len(pruned.plan.keep[name]) for name in sorted(pruned.plan.keep)]


def test_slopes_by_hand() -> None:
    """Six units, the error 0, 1, 5 and 6 with 6, 4, 2 and 1 left: slopes 1/2, 2, 1 in the middle of those that left: at 1, 3, 4.5."""
    found = _slopes({6: 0.0, 4: 1.0, 2: 5.0, 1: 6.0}, [3, 0, 5, 1, 2], unit=10.0)
    assert found.tolist() == pytest.approx([8.75, 50 / 3, 50 / 3, 5, torch.inf, 16.25])
    order = found.argsort().tolist()
    assert order == [3, 0, 5, 1, 2, 4]  # of equals the first to leave leaves first


def test_a_layer_that_says_little_gives_the_most(tiny_llama: Any) -> None:
    model = tiny_llama(num_hidden_layers=3)
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        quiet = model.model.layers[1].mlp.down_proj.weight.mul_(1e-4).clone()
    own = {"data": IDS, "method": "2ssp", "attentions": 0, "target": "macs<=85%"}
    even, measured = (secateur.prune(model, allocation=a, **own) for a in ("uniform", "measured"))
    size = model.config.intermediate_size
    assert max(kept(even)) == min(kept(even)) and measured.report["met"]
    left = [len(measured.plan.keep.get(f"model.layers.{i}.mlp:neurons", range(size))) for i in range(3)]
    assert left[1] < min(kept(even)) < left[0] and left[1] < left[2]
    assert torch.equal(model.model.layers[1].mlp.down_proj.weight, quiet)
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items() if "1.mlp.down" not in n)


def test_what_is_measured_is_what_predictions_lose() -> None:
    """The first unit to leave costs half of what two do, by the error of the output, scaled to the KL that three come to."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 10, bias=False), nn.ReLU(), nn.Linear(10, 3, bias=False)).eval()
    x = torch.randn(64, 4)
    graph = secateur.trace(net, x[:2])
    name = graph.prunable()[0].name
    reads = next(s for s in graph[name].slices if s.role == "in")
    matrix = every_matrix(net)[reads.name]
    size = torch.arange(10.0)
    found = by_what_is_lost(
        net, graph, [Competitor(name, "neurons", size)], {name: (reads, matrix)}, [x], x, {name: 7}
    )[name]

    with torch.no_grad():
        dense = net(x).double()
        read = net[1](net[0](x)).double()
    weight, length = net[2].weight.detach().double(), dense.norm(dim=1, keepdim=True)
    pull = 0.01 * ((read / length) ** 2).sum(0).mean()

    def without(count: int) -> tuple[float, torch.Tensor]:
        own, target = (read / length)[:, count:], dense / length
        ridge = pull.sqrt() * torch.eye(10 - count, dtype=torch.float64)
        solved = torch.linalg.lstsq(
            torch.cat([own, ridge]), torch.cat([target, ridge @ weight[:, count:].T])
        ).solution
        return float((own @ solved - target).square().sum()), read[:, count:] @ solved

    given = without(3)[1]
    loss = (dense.softmax(-1) * (dense.log_softmax(-1) - given.log_softmax(-1))).sum(-1).mean()
    assert float(found[0]) == pytest.approx(float(without(2)[0] / 2 * loss / without(3)[0] / 7), rel=1e-3)
    assert found.argsort().tolist() == list(range(10))


def test_what_no_linear_layer_reads_is_refused(tiny_llama: Any) -> None:
    with pytest.raises(SecateurError, match="allocation"):
        secateur.prune(tiny_llama(), method="shortgpt", target="75%", data=IDS, allocation="measured")
    with pytest.raises(SecateurError, match="there is no allocation for weights 'measured'"):
        secateur.prune(tiny_llama(), method="wanda", target="50%", data=IDS, allocation="measured")
