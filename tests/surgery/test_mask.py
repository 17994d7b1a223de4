"""Masks of units: what they write, and a trial that leaves nothing behind."""

import copy

import pytest
import torch
from torch import nn

from secateur.graph import trace
from secateur.surgery import cut_units, mask_units, unmask_units
from secateur.surgery.mask import unit_masks
from secateur.surgery.trial import trial


def network():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3), nn.Flatten(), nn.Linear(8, 5)
    )
    return net.eval()


X = torch.randn(2, 3, 6, 6)


def keeps(graph):
    wide, narrow = sorted(graph.prunable(), key=lambda g: -g.size)
    return {wide.name: torch.tensor([0, 3]), narrow.name: torch.tensor([1])}


def test_unit_masks_are_where_zeros_are_written():
    net = network()
    graph = trace(net, X)
    masks = unit_masks(net, graph, keeps(graph))
    masked = copy.deepcopy(net)
    with torch.no_grad():
        for parameter in masked.parameters():
            parameter.fill_(1.0)
    mask_units(masked, graph, keeps(graph))
    assert {n: m.int().tolist() for n, m in masks.items()} == {
        n: p.int().tolist() for n, p in masked.named_parameters() if not p.all()
    }
    assert masks["0.weight"].flatten(1).all(1).tolist() == [True, False, False, True]
    assert masks["3.weight"].sum() == 1 * 2 * 9 and masks["5.weight"].sum() == 5 * 4
    assert not any("running" in name for name in masks)


def test_a_trial_is_the_masked_network_and_leaves_it_to_the_bit():
    net = network()
    graph = trace(net, X)
    before, dense = copy.deepcopy(net.state_dict()), net(X)
    cut = copy.deepcopy(net)
    cut_units(cut, graph, keeps(graph))
    with pytest.raises(RuntimeError), trial(net, graph, keeps(graph)):
        torch.testing.assert_close(net(X), cut(X), rtol=0, atol=1e-6)
        assert not torch.equal(net(X), dense)
        raise RuntimeError
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in before.items())


def test_hooks_that_the_user_put_on_a_model_stay():
    net = network()
    graph = trace(net, X)
    seen = []
    net[0].register_forward_hook(lambda *_: seen.append(1))
    mask_units(net, graph, keeps(graph))
    unmask_units(net)
    net(X)
    assert seen == [1]
