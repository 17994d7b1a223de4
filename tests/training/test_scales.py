"""Scales of BatchNorms, by hand: which leave, what coupled layers agree on, and the penalty."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from secateur.errors import SecateurError
from secateur.training.scales import (
    Sparsify,
    above,
    as_masks,
    batchnorm_scales,
    gammas,
    of_layers,
    ot_threshold,
    penalty_gradient,
    separation,
    vote,
)

SCALES = {
    "a": nn.Parameter(torch.tensor([0.5, -0.3, 0.0, 0.2])),
    "b": nn.Parameter(torch.tensor([-0.9, 0.1])),
}
SLICES = [
    SimpleNamespace(name="a", index=torch.tensor([[0, 1], [2, 3]])),
    SimpleNamespace(name="conv", index=torch.tensor([[0], [1]])),
    SimpleNamespace(name="b", index=torch.tensor([[0], [1]])),
]
GROUP = SimpleNamespace(size=2, slices=SLICES)


def test_only_scales_of_batchnorms_that_have_them():
    net = nn.Sequential(nn.BatchNorm2d(2), nn.BatchNorm1d(3, affine=False), nn.GroupNorm(1, 2))
    assert list(batchnorm_scales(net)) == ["0.weight"] and list(batchnorm_scales(net[0])) == ["weight"]
    with pytest.raises(SecateurError, match="no BatchNorm with scales"):
        batchnorm_scales(net[1:])


def test_as_many_leave_as_hold_a_share_of_the_squares():
    """Squares 9, 16, 25, 950 of 1000: with a share of 5 % three leave, of 2.5 % two, of 0.8 % none."""
    gamma = torch.tensor([4.0, -3.0, 950**0.5, 5.0])
    assert ot_threshold(gamma, 0.0501) == pytest.approx((5 + 950**0.5) / 2)
    assert ot_threshold(gamma, 0.025001) == pytest.approx((4 + 5) / 2)
    assert ot_threshold(gamma, 0.008) == 0.0
    assert ot_threshold(torch.tensor([1.0, 1.0]), 0.5) == 1.0  # exactly half: the mean of the two
    assert ot_threshold(torch.tensor([0.25, 0.5]), 0.0, least=0.5) == 0.0
    assert ot_threshold(torch.tensor([0.25, 0.499]), 0.0, least=0.5) == 1.0
    assert ot_threshold(torch.tensor([1e-4, 9e-4])) == 1.0 and ot_threshold(torch.tensor([1e-6, 2e-3])) > 0


def test_what_is_at_the_threshold_leaves_but_the_first_largest_stays():
    gamma = torch.tensor([0.1, -0.4, 0.4, 0.2])
    assert above(gamma, 0.2).int().tolist() == [0, 1, 1, 0]
    assert above(gamma, 0.4).int().tolist() == [0, 1, 0, 0]


@pytest.mark.parametrize(
    ("keep", "expected"),
    [
        ([[1, 1, 1], [1, 0, 0]], [1, 1, 1]),  # one member gives up nothing
        ([[0, 0, 1], [0, 1, 1]], [0, 1, 1]),  # both agree on one, and the fewest is one
        ([[0, 0, 1, 1], [1, 0, 0, 1], [0, 1, 0, 1]], [0, 0, 0, 1]),  # two votes each, two would have done
        ([[0, 0, 1, 1], [0, 1, 0, 1], [1, 1, 0, 0]], [0, 1, 0, 1]),  # two agree on the first and the third
        ([[0, 0, 1], [1, 0, 0]], [1, 0, 0]),  # all would leave: the first with the fewest votes stays
        ([[0, 1]], [0, 1]),
    ],
)
def test_members_vote(keep, expected):
    assert vote(torch.tensor(keep).bool()).int().tolist() == expected


def test_of_those_with_the_fewest_votes_the_largest_stays():
    keep = torch.tensor([[0, 0, 1], [1, 0, 0]]).bool()
    assert vote(keep, torch.tensor([[0.1, 0.5, -0.3], [0.1, 0.5, 0.0]])).int().tolist() == [0, 0, 1]


def test_units_of_several_channels_have_their_largest_scale():
    assert gammas(GROUP, SCALES).tolist() == torch.tensor([[0.5, 0.2], [0.9, 0.1]]).tolist()


def test_masks_of_layers_from_masks_of_groups():
    found = of_layers({"g": GROUP}, {"g": torch.tensor([True, False])}, SCALES)
    assert {n: m.int().tolist() for n, m in found.items()} == {"a": [1, 1, 0, 0], "b": [1, 0]}
    assert of_layers({"g": GROUP}, {"g": torch.tensor([True, True])}, SCALES) == {}
    masks = as_masks({"g": GROUP, "h": GROUP}, {"g": torch.tensor([1]), "other": torch.tensor([0])})
    assert {n: m.int().tolist() for n, m in masks.items()} == {"g": [0, 1], "h": [1, 1]}


def test_how_well_scales_have_parted():
    found = separation(SCALES, {"a": torch.tensor([True, False, False, True])})
    assert found == pytest.approx(
        {"largest_gamma_that_leaves": 0.3, "leaving_below_0.01": 0.5, "smallest_gamma_that_stays": 0.1}
    )
    assert separation(SCALES, {"b": torch.tensor([True, False])}, below=0.1)["leaving_below_0.01"] == 0
    assert separation(SCALES, {}) == {}


def test_penalties():
    gamma = torch.tensor([0.9, -0.02, 0.0, 0.5])
    assert penalty_gradient(gamma).tolist() == [1, -1, 0, 1]
    assert torch.equal(penalty_gradient(gamma, "l2"), gamma)
    assert penalty_gradient(gamma, "smooth-l1", 0.5).tolist() == torch.tensor([1, -0.02, 0, 1]).tolist()


def test_the_penalty_joins_the_gradients_of_what_leaves():
    scales = {n: nn.Parameter(p.detach().clone()) for n, p in SCALES.items()}
    scales["c"] = nn.Parameter(torch.ones(2))  # without a gradient
    for name in "ab":
        scales[name].grad = torch.ones_like(scales[name])
    keep = {"a": torch.tensor([True, False, False, False]), "c": torch.tensor([False, True])}
    Sparsify(scales, keep, 0.1)(SimpleNamespace(lr=1.0))
    torch.testing.assert_close(scales["a"].grad, torch.tensor([1, 0.9, 1, 1.1]))
    assert scales["b"].grad.tolist() == [1, 1] and scales["c"].grad is None
    Sparsify(scales, keep, 2.5, "smooth-l1")(
        SimpleNamespace(lr=0.1)
    )  # below 0.25 the scale itself, above its sign
    torch.testing.assert_close(scales["a"].grad, torch.tensor([1, -1.6, 1, 1.6]))
