"""LLM-Pruner: the sheet's rows, every element and aggregation by hand, and the ranking it gives a real model."""

import pytest
import torch
from torch import nn

import secateur
from secateur import SecateurError
from secateur.methods.taylor import ELEMENTS, Taylor, element_scores
from secateur.scores.lift import AGGREGATIONS, aggregate, slice_scores


def two_layers():
    """f = w2 (w1 x), ½(f - 1)² (the sheet's example): (w1, its gradient)."""
    w1 = torch.tensor([[1.0, -2.0], [0.5, 1.0]], requires_grad=True)
    w2, x = torch.tensor([1.0, -1.0]), torch.tensor([1.0, 2.0])
    loss = 0.5 * (w2 @ (w1 @ x) - 1) ** 2
    assert loss.item() == 21.125
    return w1.detach(), torch.autograd.grad(loss, w1)[0]


def test_the_rows_of_the_sheet():
    w1, g = two_layers()
    gate = element_scores("gate", w1, g, None, dim=0)
    assert gate.tolist() == [380.25, 264.0625]
    square = slice_scores(element_scores("square", w1, g, None, dim=0), 0, torch.tensor([[0], [1]]))
    assert square.tolist() == [718.25, 179.5625]


@pytest.mark.parametrize(
    "element, rows",
    [  # g·w = [[-6.5, 26], [3.25, 13]]
        ("param_first", [32.5, 16.25]),
        ("vectorize", [19.5, 16.25]),
        ("param_second", [0.5 * 1 + 1 * 4, 2 * 0.25 + 4 * 1]),  # w² F
        ("param_mix", [6.5 + 0.25 + 26 - 2, 3.25 - 0.25 + 13 - 2]),  # |gw - w² F / 2|
    ],
)
def test_elements_by_hand(element, rows):
    w1, g = two_layers()
    fisher = torch.tensor([[0.5, 1.0], [2.0, 4.0]])
    found = slice_scores(element_scores(element, w1, g, fisher, 0), 0, torch.tensor([[0], [1]]))
    assert found.tolist() == pytest.approx(rows)


def test_consecutive_rows_and_columns_belong_to_one_head():
    scores = torch.arange(12.0).reshape(4, 3)
    assert slice_scores(scores, 0, torch.tensor([[0, 1], [2, 3]])).tolist() == [15.0, 51.0]
    assert slice_scores(scores, 1, torch.tensor([[0], [1], [2]])).tolist() == [18.0, 22.0, 26.0]


@pytest.mark.parametrize(
    "how, expected",
    [("sum", [5, 6]), ("mean", [2.5, 3]), ("max", [4, 4]), ("prod", [4, 8]), ("first", [1, 4])],
)
def test_aggregations(how, expected):
    assert aggregate(torch.tensor([[1.0, 4.0], [4.0, 2.0]]), how).tolist() == expected


@pytest.fixture
def model(tiny_llama):
    return tiny_llama(num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4)


@pytest.fixture
def ids():
    return torch.randint(0, 64, (10, 24), generator=torch.Generator().manual_seed(1))


def test_neurons_against_gradients_taken_by_hand(model, ids, plan_of):
    """`vectorize` with one window: the plan's order is that of |Σ w·g| summed over gate, up and down."""
    plan = plan_of(model, "taylor", "70%", ids[:1], element="vectorize", kinds=("neurons",))
    with torch.enable_grad():
        model(input_ids=ids[:1], labels=ids[:1]).loss.backward()
    for layer, block in enumerate(model.model.layers):
        saliency = torch.zeros(48)
        for linear, dim in ((block.mlp.gate_proj, 1), (block.mlp.up_proj, 1), (block.mlp.down_proj, 0)):
            saliency += (linear.weight * linear.weight.grad).sum(dim).abs().detach()
        kept = plan.keep[f"model.layers.{layer}.mlp:neurons"]
        best = saliency.topk(len(kept)).indices.sort().values
        assert torch.equal(kept, best)


def test_layers_lose_alike_and_spared_blocks_stay(model, ids, plan_of):
    pruned = secateur.prune(model, method="taylor", target="75%", data=ids)
    assert len({block.mlp.up_proj.out_features for block in pruned.model.model.layers}) == 1
    plan = plan_of(model, "taylor", "75%", ids, spare_first=1, spare_last=1)
    kept = {name: len(units) for name, units in plan.keep.items() if name.endswith(":neurons")}
    assert kept.keys() == {"model.layers.1.mlp:neurons", "model.layers.2.mlp:neurons"}
    assert len(set(kept.values())) == 1


@pytest.mark.parametrize("element", ELEMENTS)
def test_every_element_gives_a_plan(tiny_llama, ids, element, plan_of):
    assert plan_of(tiny_llama(), "taylor", "60%", ids, element=element).keep


def test_a_loss_of_ones_own_reaches_a_model_without_labels():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    inputs = torch.randn(12, 8)
    found = secateur.prune(
        net,
        inputs[:2],
        method="taylor",
        target="50%",
        data=[inputs],
        loss=lambda model, batch: model(batch).square().sum(1).mean(),
    )
    with torch.enable_grad():
        net(inputs).square().sum(1).mean().backward()
    by_hand = (net[0].weight * net[0].weight.grad).abs().sum(1) + (
        net[2].weight * net[2].weight.grad
    ).abs().sum(0)
    best = by_hand.topk(len(found.plan.keep["0:neurons"])).indices.sort().values
    assert torch.equal(found.plan.keep["0:neurons"], best)


def test_unknown_words_are_refused():
    with pytest.raises(SecateurError, match="param_third"):
        Taylor(element="param_third")
    with pytest.raises(SecateurError, match=", ".join(AGGREGATIONS)):
        Taylor(aggregation="median")
