"""REAM: groups, order of neurons and means by hand; layer after layer; saved as its own class; refused."""

import pytest
import torch
import transformers
from test_expert_stats import IDS, SMALL, Listed, build
from torch import nn

import secateur
from secateur import SecateurError
from secateur.method import make_method
from secateur.methods.ream import average
from secateur.solvers.merging import distances, join, unused
from secateur.stats.likeness import experts_of


def test_two_experts_become_one_by_hand():
    """Expert n gives n + 1 times its input. Expert 1 is worth least, and 2 takes it first, though 0 would have it too."""
    model, x = Listed().eval(), torch.tensor([[1.0, 0.0], [-3.0, 4.0]])
    small = secateur.prune(model, [x], method="ream", target="67%", data=[x])
    assert small.plan.keep["experts:experts"].tolist() == [0, 2]
    a, b = 1 / (1 + torch.e**-1), 1 / (1 + torch.e**-3)
    least, most = ((1 - a) * 2 + (1 - b) * 10) / 2, b * 15  # means of weight times norm
    merged = (most * 3 + least * 2) / (most + least)
    torch.testing.assert_close(small.model.experts[1].weight, torch.eye(2) * merged)
    assert torch.equal(small.model.experts[0].weight, torch.eye(2))
    assert torch.equal(small.model.gate.weight, model.gate.weight[[0, 2]])


def test_how_far_apart_by_hand():
    """Outputs at 0, 90 and 180 degrees are alike by 1, 1/2 and 0; logits (1, 0), (1, 0) and (0, 1) are 0 and sqrt 2 apart."""
    outputs, logits = torch.tensor([[2.0, 0], [0, 3], [-1, 0]]), torch.tensor([[1.0, 0], [4, 0], [0, 2]])
    found = distances(outputs, logits @ logits.T)
    assert found.flatten().tolist() == pytest.approx([0, 0.25, 1, 0.25, 0, 0.75, 1, 0.75, 0], abs=1e-6)


def test_each_centre_takes_its_nearest_until_it_is_full():
    """The most salient comes first, also to those that would be nearer to another."""
    apart = torch.tensor(
        [[0, 9, 1, 2, 3], [9, 0, 0.5, 8, 7], [1, 0.5, 0, 9, 9], [2, 8, 9, 0, 9], [3, 7, 9, 9, 0]]
    )
    assert join(apart, [0, 1], 16) == {0: [2, 3, 4], 1: []}
    assert join(apart, [0, 1], 3) == {0: [2, 3], 1: [4]}
    assert join(apart, [1, 0], 3) == {1: [2, 4], 0: [3]}
    with pytest.raises(SecateurError, match="2 groups of 2 don't hold 5 experts"):
        join(apart, [0, 1], 2)
    assert unused(torch.tensor([0.0, 3.0, 0.7])).tolist() == pytest.approx([0.5, 3.0, 0.7])


def test_neurons_are_matched_before_they_are_averaged():
    """An expert whose neurons are another's in a different order changes nothing; left in its order it would."""
    model = build("mixtral")
    order, own = torch.randperm(24), model.model.layers[0].mlp.experts
    own.gate_up_proj.data[3] = own.gate_up_proj.data[1].view(2, 24, 16)[:, order].reshape(48, 16)
    own.down_proj.data[3] = own.down_proj.data[1][:, order]
    graph = secateur.trace(model, {"input_ids": IDS})
    experts = experts_of(model, graph, graph["model.layers.0.mlp:experts"])
    first, other = experts[1], experts[3]
    rows = [e.tensors["model.layers.0.mlp.experts.down_proj"].T for e in (first, other)]
    for expert in average([first, other], [[rows[0]], [rows[1]]], torch.tensor([1.0, 3.0])).items():
        torch.testing.assert_close(expert[1], first.tensors[expert[0]])
    told = average([first, other], [[torch.eye(24)], [torch.eye(24)]], torch.tensor([1.0, 3.0]))
    by_hand = own.down_proj[1] / 4 + own.down_proj[3] * 3 / 4
    torch.testing.assert_close(told["model.layers.0.mlp.experts.down_proj"], by_hand.detach())


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3"])
def test_half_stay_of_every_layer_in_a_model_of_the_same_class(name, tmp_path):
    model = build(name)
    before = {n: p.clone() for n, p in model.state_dict().items()}
    pruned = secateur.prune(model, method="ream", target="50%", data=IDS, seqlen=16)
    assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items())
    assert len(pruned.plan.keep) == 2 and not any(m._forward_hooks for m in model.modules())
    for group, units in pruned.plan.keep.items():
        assert 2 * len(units) == pruned.graph[group].size
    reaped = secateur.prune(model, method="reap", target="50%", data=IDS, seqlen=16)
    first = "model.layers.0.mlp"
    assert torch.equal(pruned.plan.keep[f"{first}:experts"], reaped.plan.keep[f"{first}:experts"])
    router = f"{first}.gate.weight"
    assert torch.equal(pruned.model.get_parameter(router), reaped.model.get_parameter(router))
    names = [f"{first}.experts.{own}" for own in ("gate_up_proj", "down_proj")]
    assert not any(torch.equal(pruned.model.get_parameter(n), reaped.model.get_parameter(n)) for n in names)
    pruned.save(tmp_path / "small")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "small").eval()
    assert type(loaded) is type(model)
    with torch.no_grad():
        torch.testing.assert_close(loaded(IDS).logits, pruned.model(IDS).logits)


def test_a_layer_is_merged_on_what_those_before_it_became():
    model = build("mixtral")
    at_once = secateur.prune(model, method="ream", target="50%", data=IDS, seqlen=16)
    first = secateur.prune(model, method="ream", target="50%", data=IDS, seqlen=16, only=("model.layers.0",))
    then = secateur.prune(
        first.model, method="ream", target="50%", data=IDS, seqlen=16, only=("model.layers.1",)
    )
    for (name, a), b in zip(at_once.model.named_parameters(), then.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


class Pair(nn.Module):
    """Two experts of unequal width behind a router that picks one."""

    def __init__(self, *widths):
        super().__init__()
        self.gate = nn.Linear(4, len(widths), bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(4, n), nn.ReLU(), nn.Linear(n, 4)) for n in widths
        )

    def forward(self, x):
        weights, picked = torch.topk(self.gate(x).softmax(-1), 1, -1)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            token, place = torch.where(picked == number)
            out[token] += expert(x[token]) * weights[token, place, None]
        return out


def test_experts_in_lists_are_merged_neuron_by_neuron():
    torch.manual_seed(0)
    model, x = Pair(6, 6, 6).eval(), torch.randn(64, 4)
    order = torch.randperm(6)
    for own, other in ((0, 1), (0, 2)):  # three times one expert
        one, two = model.experts[own], model.experts[other]
        two[0].weight.data, two[0].bias.data = one[0].weight.data[order], one[0].bias.data[order]
        two[2].weight.data, two[2].bias.data = one[2].weight.data[:, order], one[2].bias.data.clone()
    small = secateur.prune(model, [x], method="ream", target="34%", data=[x])
    (stays,) = small.plan.keep["experts:experts"].tolist()
    for a, b in zip(small.model.experts[0].parameters(), model.experts[stays].parameters()):
        torch.testing.assert_close(a, b)


def test_what_cannot_be_is_refused_and_the_model_untouched():
    model = build("mixtral")
    before = {n: p.clone() for n, p in model.state_dict().items()}
    for match, method, settings in (
        ("8,848 params is left", "ream", {"target": "params<=5%"}),
        ("it merges once", "ream", {"target": "50%", "schedule": "iterative:2"}),
        ("3 groups of 1 don't hold 6", make_method("ream", group_size=1), {"target": "50%"}),
        ("takes none", "ream", {"target": "50%", "repair": "bias"}),
    ):
        with pytest.raises(SecateurError, match=match):
            secateur.prune(model, method=method, data=IDS, seqlen=16, **settings)
    assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    one = transformers.MixtralConfig(**{**SMALL, "num_experts_per_tok": 1}, num_local_experts=1)
    with pytest.raises(SecateurError, match="nothing can be cut"):
        secateur.prune(
            transformers.MixtralForCausalLM(one).eval(), method="ream", target="50%", data=IDS, seqlen=16
        )
    uneven, x = Pair(6, 5).eval(), torch.randn(8, 4)
    with pytest.raises(SecateurError, match="nothing can be cut"):
        secateur.prune(uneven, [x], method="ream", target="50%", data=[x])
