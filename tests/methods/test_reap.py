"""REAP: the selection by hand, against magnitude and counts, in grouped routers, saved, and refused."""

import pytest
import torch
import transformers
from test_expert_stats import IDS, SMALL, Listed, build

import secateur
from secateur import SecateurError
from secateur.methods.reap import saliency
from secateur.stats.experts import ExpertStats


def test_the_mean_over_the_tokens_that_come():
    """Eq. 9: not the sum, by which the busy expert would stay; an expert without tokens is worth nothing."""
    tokens, weighted = torch.tensor([2.0, 10.0, 0.0]), torch.tensor([3.0, 5.0, 0.0])
    found = saliency(ExpertStats(tokens, tokens, tokens, weighted, torch.zeros(3, 2), tokens))
    assert found.tolist() == [1.5, 0.5, 0.0]


def test_the_expert_that_leaves_by_hand():
    model, x = Listed().eval(), torch.tensor([[1.0, 0.0], [-3.0, 4.0]])
    # means of weight times norm: 0.731, (0.269 * 2 + 0.047 * 10) / 2 = 0.506, 0.953 * 15; the smallest weights are expert 0's
    small = secateur.prune(model, [x], method="reap", target="67%", data=[x])
    assert small.plan.keep["experts:experts"].tolist() == [0, 2]
    by_size = secateur.prune(model, [x], method="group-magnitude", target="67%", kinds=("experts",))
    assert by_size.plan.keep["experts:experts"].tolist() == [1, 2]


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "deepseek_v3", "glm4_moe"])
def test_half_leave_of_every_layer_and_it_loads_again(name, tmp_path):
    model = build(name)
    pruned = secateur.prune(model, method="reap", target="50%", data=IDS, seqlen=16)
    assert len(pruned.plan.keep) == 2
    for group, units in pruned.plan.keep.items():
        assert 2 * len(units) == pruned.graph[group].size
    shared = [n for n, _ in model.named_parameters() if "shared" in n]
    assert all(torch.equal(model.get_parameter(n), pruned.model.get_parameter(n)) for n in shared)
    pruned.save(tmp_path / "small")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "small").eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(IDS).logits, pruned.model(IDS).logits)


def test_a_model_without_experts_and_one_that_needs_them_all(tiny_llama):
    with pytest.raises(SecateurError, match=r"nothing can be cut \(the graph holds only"):
        secateur.prune(tiny_llama(), method="reap", target="50%", data=IDS, seqlen=16)
    small = {**SMALL, "num_experts_per_tok": 1}
    one = transformers.MixtralForCausalLM(transformers.MixtralConfig(**small, num_local_experts=1)).eval()
    with pytest.raises(SecateurError, match="nothing can be cut"):
        secateur.prune(one, method="reap", target="50%", data=IDS, seqlen=16)


def test_experts_of_different_widths_are_named_with_their_shapes():
    model = Listed()
    model.experts[1] = torch.nn.Linear(2, 2)
    x = torch.randn(6, 2)
    with pytest.raises(SecateurError, match=r"alike: bias of experts.0 is none, of experts.1 \[2\]"):
        secateur.prune(model.eval(), [x], method="reap", target="67%", data=[x])


def test_a_target_below_the_floor_names_what_can_be_reached():
    with pytest.raises(SecateurError, match="8,848 params is left") as error:
        secateur.prune(build("mixtral"), method="reap", target="params<=5%", data=IDS, seqlen=16)
    assert error.value.where == "target"


def test_data_without_a_token_is_refused():
    batch = {"input_ids": IDS, "attention_mask": torch.zeros_like(IDS)}
    with pytest.raises(SecateurError, match="no token reached"):
        secateur.prune(build("mixtral"), {"input_ids": IDS}, method="reap", target="50%", data=[batch])
