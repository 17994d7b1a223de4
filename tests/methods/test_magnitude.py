"""The worked examples and invariants of magnitude."""

import torch
from torch import nn
from weight_examples import W, kept

from secateur.method import make_method
from secateur.pruning.select import Pattern
from secateur.stats.layer import LayerStats


def test_magnitude():
    _, mask = make_method("magnitude", scope="row").solve(W, LayerStats(), Pattern(4, "row"))
    assert kept(~mask) == [[0, 2], [0, 1]]
    # of all: |w| sorted .3 .4 .9 1 1 2 2 3; of the equal ones the earlier stays
    weight, mask = make_method("magnitude").solve(W, LayerStats(), Pattern(4, "layer"))
    assert kept(mask) == [[0, 1, 3], [2]]
    assert torch.equal(weight, torch.tensor([[1.0, -2, 0, 3], [0, 0, 2, 0]]))


def test_global_and_layerwise_magnitude_agree_on_one_layer_and_differ_on_two():
    import secateur

    torch.manual_seed(0)
    single = nn.Sequential(nn.Linear(8, 6))
    two = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 8))
    with torch.no_grad():
        two[2].weight *= 10

    def masks(model, scope):
        pruned = secateur.prune(model, torch.randn(1, 8), method="magnitude", target="50%", scope=scope)
        return pruned.plan.masks

    assert torch.equal(masks(single, "global")["0.weight"], masks(single, "layer")["0.weight"])
    counts = {name: int(mask.sum()) for name, mask in masks(two, "global").items()}
    assert counts["2.weight"] > 40 and sum(counts.values()) == 48
    assert [int(mask.sum()) for mask in masks(two, "layer").values()] == [24, 24]
