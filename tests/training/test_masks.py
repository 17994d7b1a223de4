"""Magnitude selection and its controls, by the worked examples of the spec sheet lottery-ticket."""

import pytest
import torch
from torch import Tensor, nn

from secateur.errors import SecateurError
from secateur.training import fit
from secateur.training.masks import Masked, density, full_masks, prune_smallest, shuffled

FIRST = {
    "fc1": torch.tensor([[0.5, -0.1, 0.02], [0.05, -0.9, 0.3]]),
    "fc2": torch.tensor([[0.4, -0.2], [0.7, -0.06]]),
}


def bits(masks: dict[str, Tensor]) -> dict[str, list]:
    return {name: mask.int().tolist() for name, mask in masks.items()}


def test_global_rounds_remove_exactly_as_many_as_asked() -> None:
    once = prune_smallest(FIRST, full_masks(FIRST), 0.2)
    assert bits(once) == {"fc1": [[1, 1, 0], [0, 1, 1]], "fc2": [[1, 1], [1, 1]]}
    trained = {
        "fc1": torch.tensor([[0.6, 9, 9], [9, -1.0, 0.1]]),
        "fc2": torch.tensor([[0.5, -0.15], [0.8, 9]]),
    }
    trained["fc1"][0, 1] = 9.0
    twice = prune_smallest(trained, once, 0.2)
    assert bits(twice) == {"fc1": [[1, 1, 0], [0, 1, 0]], "fc2": [[1, 0], [1, 1]]}


def test_the_published_codes_remove_one_more() -> None:
    everything = full_masks(FIRST)
    assert bits(prune_smallest(FIRST, everything, 0.2, compat="open_lth")) == {
        "fc1": [[1, 1, 0], [0, 1, 1]],
        "fc2": [[1, 1], [1, 0]],
    }
    legacy = prune_smallest(FIRST, everything, 0.2, scope="layer", compat="legacy")
    assert bits(legacy) == {"fc1": [[1, 1, 0], [0, 1, 1]], "fc2": [[1, 0], [1, 0]]}
    output = prune_smallest(FIRST, everything, {"fc1": 0.2, "fc2": 0.1}, scope="layer", compat="legacy")
    assert bits(output)["fc2"] == [[1, 1], [1, 0]]


def test_densities_of_lenet_are_those_the_paper_quotes() -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = {"fc1": (300, 784), "fc2": (100, 300), "out": (10, 100)}
    weights = {name: torch.randn(shape, generator=generator) for name, shape in sizes.items()}
    masks, found = full_masks(weights), {}
    for level in range(1, 17):
        masks = prune_smallest(weights, masks, {"fc1": 0.2, "fc2": 0.2, "out": 0.1}, scope="layer")
        found[level] = round(100 * density(masks), 1)
    assert {n: found[n] for n in (3, 7, 9, 15, 16)} == {3: 51.3, 7: 21.1, 9: 13.5, 15: 3.6, 16: 2.9}


def test_masks_are_nested_and_round_up() -> None:
    weights = {"w": torch.randn(20, 30, generator=torch.Generator().manual_seed(1))}
    masks, shares = full_masks(weights), []
    for _ in range(4):
        smaller = prune_smallest(weights, masks, 0.2)
        assert not (smaller["w"] & ~masks["w"]).any()
        masks = smaller
        shares.append(density(masks))
    assert shares[:3] == pytest.approx([0.8, 0.64, 0.511667], abs=1e-6)
    assert shares[3] == pytest.approx(0.8**4, abs=1 / 600 + 1e-9)
    assert bits(prune_smallest(weights, masks, 0.0)) == bits(masks)


def test_ties_leave_by_position_and_skipped_layers_still_count() -> None:
    flat = {"a": torch.ones(4), "b": torch.ones(4)}
    assert bits(prune_smallest(flat, full_masks(flat), 0.6)) == {"a": [0, 0, 0, 0], "b": [0, 1, 1, 1]}
    assert bits(prune_smallest(flat, full_masks(flat), 0.25, skip=("a",))) == {
        "a": [1] * 4,
        "b": [0, 0, 1, 1],
    }
    assert bits(prune_smallest(flat, full_masks(flat), keep=5, skip=("a",)))["b"] == [0, 0, 0, 1]
    with pytest.raises(SecateurError, match="6 of 4 weights would leave"):
        prune_smallest(flat, full_masks(flat), 0.75, skip=("a",))


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_the_controls_keep_as_many(scope: str) -> None:
    masks = {"a": torch.rand(9, 7) < 0.3, "b": torch.rand(50) < 0.7}
    control = shuffled(masks, torch.Generator().manual_seed(0), scope)
    assert density(control) == density(masks) and bits(control) != bits(masks)
    same = [int(control[name].sum()) == int(masks[name].sum()) for name in masks]
    assert all(same) if scope == "layer" else not all(same)


def test_what_is_masked_stays_zero_while_training() -> None:
    """Momentum carries pruned weights away at every step unless the mask is applied again."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
    masks = {"0.weight": torch.rand(16, 6) < 0.2, "2.weight": torch.rand(3, 16) < 0.2}
    x = torch.randn(40, 6)
    data = (x, (x[:, 0] > 0).long())
    before = model[0].weight.detach().clone()
    fit(model, data, steps=10, lr=0.1, optimizer="sgd", warmup=0, after_step=[Masked(model, masks)])
    for name, mask in masks.items():
        assert not model.get_parameter(name)[~mask].any()
        assert model.get_parameter(name)[mask].all()
    assert not torch.equal(model[0].weight[masks["0.weight"]], before[masks["0.weight"]])


def test_a_mask_that_empties_a_layer_or_fits_no_layer_is_refused() -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3))
    before = model[0].weight.detach().clone()
    with pytest.raises(SecateurError, match=r"empties the layer.*"):
        Masked(model, {"0.weight": torch.ones(4, 6).bool(), "1.weight": torch.zeros(3, 4).bool()})
    with pytest.raises(SecateurError, match=r"mask of \[3, 3\] for 1.weight"):
        Masked(model, {"1.weight": torch.ones(3, 3).bool()})
    assert torch.equal(model[0].weight, before)
