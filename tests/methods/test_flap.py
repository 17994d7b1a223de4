"""FLAP: the sheet's metric, cut and compensation, and what it does to a model."""

import pytest
import torch
from torch import nn

import secateur
from secateur import SecateurError
from secateur.methods.flap import Flap, compensation, standardise, unit_metric, wifv
from secateur.pruning.allocate import cut_at

W = torch.tensor([[1.0, -2.0, 0.9, 3.0], [-0.4, 0.3, 2.0, -1.0]])
X = torch.tensor([[1.0, 0, 2, -1], [0, 1, 1, 1], [2, 1, 0, 0], [1, -1, 4, 0]])


def test_the_metric_of_the_sheet():
    variance = X.var(0)
    assert variance.tolist() == pytest.approx([0.66667, 0.91667, 2.91667, 0.66667], abs=1e-5)
    assert wifv(W, variance).tolist() == pytest.approx([0.77333, 3.74917, 14.02917, 6.66667], abs=1e-5)


def test_the_compensation_of_the_sheet():
    gone = torch.tensor([False, True, False, False])
    assert compensation(W, X.mean(0), gone).tolist() == pytest.approx([-0.5, 0.075])


def test_the_cut_of_the_sheet():
    heads, neurons = torch.tensor([2, 0.5, -0.2, -1]), torch.tensor([1.5, 0.8, 0.1, -0.7, -1.2, 0.3])
    kept_heads, kept_neurons = cut_at([heads, neurons], [4, 1], 0.5)
    assert kept_heads.nonzero().flatten().tolist() == [0, 1]
    assert kept_neurons.nonzero().flatten().tolist() == [0, 1]


def test_ties_at_the_cut_leave_together():
    assert cut_at([torch.tensor([3.0, 1.0, 1.0, 1.0])], [1], 0.5)[0].tolist() == [True, False, False, False]


def test_channels_are_standardised_then_averaged_over_a_unit():
    metric = torch.tensor([1.0, 2.0, 3.0, 6.0])
    assert standardise(metric).tolist() == pytest.approx([-0.92582, -0.46291, 0.0, 1.38873], abs=1e-5)
    index = torch.tensor([[0, 1], [2, 3]])
    assert unit_metric(metric, index, attention=False).tolist() == pytest.approx(
        [-0.694365, 0.694365], abs=1e-5
    )
    # squares 1, 4, 9, 36: mean 12.5, unbiased deviation 16.0104
    expected = [(2.5 - 12.5) / 16.010413, (22.5 - 12.5) / 16.010413]
    assert unit_metric(metric, index, attention=True).tolist() == pytest.approx(expected, abs=1e-5)


@pytest.fixture
def model(tiny_llama):
    return tiny_llama(num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4)


@pytest.fixture
def ids():
    return torch.randint(0, 64, (8, 24), generator=torch.Generator().manual_seed(1))


def inputs_of(model, ids):
    """What every down_proj and o_proj reads: module path -> [tokens, in]."""
    seen, handles = {}, []
    for name, module in model.named_modules():
        if name.endswith(("down_proj", "o_proj")):

            def hook(module, args, name=name):
                seen[name] = args[0].flatten(0, 1)

            handles.append(module.register_forward_pre_hook(hook))
    with torch.no_grad():
        model(ids)
    for handle in handles:
        handle.remove()
    return seen


def test_scores_and_biases_against_activations_recorded_here(model, ids, plan_of):
    """A global ranking over everything, and biases that replace the removed units' mean output."""
    plan = plan_of(model, "flap", "70%", ids)
    kept_scores, gone_scores = {True: [], False: []}, {True: [], False: []}
    for path, x in inputs_of(model, ids).items():
        linear = model.get_submodule(path)
        attention = path.endswith("o_proj")
        metric = x.var(0) * linear.weight.detach().square().sum(0)
        metric = metric**2 if attention else metric
        scores = ((metric - metric.mean()) / metric.std()).reshape(-1, 8 if attention else 1).mean(1)
        name = path.rpartition(".")[0] + (":kv_groups" if attention else ":neurons")
        kept = plan.keep.get(name, torch.arange(len(scores)))
        gone = torch.ones(len(scores), dtype=torch.bool)
        gone[kept] = False
        if len(kept) > 1:  # the last unit stays whatever its score
            kept_scores[attention] += scores[kept].tolist()
        gone_scores[attention] += scores[gone].tolist()
        if gone.any():
            channels = gone.repeat_interleave(8 if attention else 1)
            expected = linear.weight.detach()[:, channels] @ x.mean(0)[channels]
            assert torch.allclose(plan.values[f"{path}.bias"], expected, atol=1e-6)
        else:
            assert f"{path}.bias" not in plan.values
    for attention in (True, False):
        assert gone_scores[attention] and min(kept_scores[attention]) > max(gone_scores[attention])


def test_compensation_keeps_the_mean_output_of_a_layer(model, ids):
    """The first MLP sees what it saw: its mean output is the dense one's."""
    settings = {"target": "60%", "data": ids, "kinds": ("neurons",)}
    first = [
        m for m in (secateur.prune(model, method="flap", compensate=c, **settings) for c in (True, False))
    ]

    def mean_output(network):
        out = []
        handle = network.model.layers[0].mlp.register_forward_hook(lambda m, a, y: out.append(y))
        with torch.no_grad():
            network(ids)
        handle.remove()
        return out[0].flatten(0, 1).mean(0)

    dense = mean_output(model)
    with_bias, without = (mean_output(p.model) for p in first)
    assert torch.allclose(with_bias, dense, atol=1e-7)
    assert not torch.allclose(without, dense, atol=1e-7)
    assert not first[1].plan.values


def test_an_existing_bias_is_added_to(tiny_llama, ids, plan_of):
    model = tiny_llama(num_hidden_layers=2, mlp_bias=True, attention_bias=True)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    plan = plan_of(model, "flap", "60%", ids, kinds=("neurons",))
    x = inputs_of(model, ids)["model.layers.0.mlp.down_proj"]
    gone = torch.ones(48, dtype=torch.bool)
    gone[plan.keep["model.layers.0.mlp:neurons"]] = False
    linear = model.model.layers[0].mlp.down_proj
    expected = linear.bias + linear.weight[:, gone] @ x.mean(0)[gone]
    assert torch.allclose(plan.values["model.layers.0.mlp.down_proj.bias"], expected, atol=1e-6)


def test_new_biases_count_where_parameters_are_bounded(model, ids):
    dense = sum(p.numel() for p in model.parameters())
    pruned = secateur.prune(model, method="flap", target="params<=70%", data=ids)
    assert any(name.endswith("bias") for name, _ in pruned.model.named_parameters())
    after = sum(p.numel() for p in pruned.model.parameters())
    assert 0.7 * dense - 3 * 32 - 32 <= after <= 0.7 * dense


def test_the_published_threshold_is_never_over_its_share(model, ids, plan_of):
    """Per layer: 4 groups of 24 hidden widths, 48 neurons of 3."""
    keep = plan_of(model, "flap", "70%", ids, rounding="paper").keep
    kept = sum(24 * len(keep.get(f"model.layers.{i}.self_attn:kv_groups", range(4))) for i in range(4))
    kept += sum(3 * len(keep.get(f"model.layers.{i}.mlp:neurons", range(48))) for i in range(4))
    dense = 4 * (24 * 4 + 3 * 48)
    assert 0.7 * dense - 24 < kept <= 0.7 * dense


def test_unknown_words_are_refused():
    with pytest.raises(SecateurError, match="exact or paper"):
        Flap(rounding="up")
