"""Grouped magnitude and random units: the norms by hand, networks without text, and the control."""

import pytest
import torch
from torch import nn

import secateur
from secateur import SecateurError


def test_the_norm_of_what_leaves_together():
    """Rows of one layer and columns of the next: √(Σ over both of w²); biases have no say."""
    net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[3.0, 0.0], [1.0, 1.0], [0.0, 2.0]]))
        net[0].bias.copy_(torch.tensor([0.0, 100.0, 0.0]))
        net[2].weight.copy_(torch.tensor([[0.0, 1.0, 2.0], [0.0, 1.0, 0.0]]))
    # squares: 9 + 0, 2 + 2, 4 + 4
    pruned = secateur.prune(net, torch.randn(2, 2), method="group-magnitude", target="67%")
    assert pruned.plan.keep["0:neurons"].tolist() == [0, 2]
    # sums of magnitudes: 3, 4, 4
    pruned = secateur.prune(net, torch.randn(2, 2), method="group-magnitude", norm=1, target="67%")
    assert pruned.plan.keep["0:neurons"].tolist() == [1, 2]


def convolutions():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, 5),
    ).eval()


def test_filters_of_a_convolutional_net():
    net = convolutions()
    pruned = secateur.prune(net, torch.randn(2, 3, 8, 8), method="group-magnitude", target="50%")
    assert (pruned.model[0].out_channels, pruned.model[3].out_channels) == (4, 6)
    norms = net[0].weight.square().sum((1, 2, 3)) + net[3].weight.square().sum((0, 2, 3))
    kept = next(units for units in pruned.plan.keep.values() if len(units) == 4)
    assert torch.equal(kept, norms.topk(4).indices.sort().values)
    assert pruned.model(torch.randn(2, 3, 8, 8)).shape == (2, 5)


def test_global_allocation_takes_the_weakest_filters_wherever_they_are():
    net = convolutions()
    with torch.no_grad():
        net[0].weight.mul_(10)
    pruned = secateur.prune(
        net, torch.randn(2, 3, 8, 8), method="group-magnitude", target="60%", allocation="global"
    )
    assert pruned.model[0].out_channels == 8 and pruned.model[3].out_channels == 4


def test_an_unknown_norm_is_refused():
    with pytest.raises(SecateurError, match="1 or 2"):
        secateur.prune(
            convolutions(), torch.randn(2, 3, 8, 8), method="group-magnitude", norm=3, target="50%"
        )


def test_random_units_depend_on_the_seed_and_are_spread_evenly(tiny_llama):
    model = tiny_llama(num_hidden_layers=4, intermediate_size=400)
    first, second = (
        secateur.prune(model, method="random-structured", target="50%", seed=seed).plan.keep
        for seed in (0, 1)
    )
    neurons = [name for name in first if name.endswith(":neurons")]
    assert any(not torch.equal(first[name], second[name]) for name in neurons)
    assert len({len(first[name]) for name in neurons}) == 1
    kept = torch.cat([first[name] for name in neurons]).float()
    # the mean of that many draws from 0..399 lies within 4 standard errors of the middle
    assert abs(kept.mean() - 199.5) < 4 * 400 / 12**0.5 / len(kept) ** 0.5
    assert not torch.equal(first[neurons[0]], first[neurons[1]])


def test_a_net_without_heads_or_neurons_says_what_it_has():
    with pytest.raises(SecateurError, match="its channels can be"):
        secateur.prune(convolutions()[:4], torch.randn(2, 3, 8, 8), method="random-structured", target="50%")


def test_grouped_magnitude_is_advised_for_convolutional_nets_without_training():
    assert "group-magnitude" in [info.name for info, _ in secateur.recommend(model="cnn")]
