"""2SSP: its formula by hand, and both stages against the released procedure on a random model."""

import copy

import pytest
import torch
import torch.nn.functional as F

import secateur
from secateur import SecateurError
from secateur.methods.two_ssp import attentions_to_remove


def test_how_many_attentions_leave_by_hand():
    """An MLP of twice an attention, alpha 1: the share squared. A quarter of 16 blocks is 1/16 of them: 1; a half 4."""
    assert [attentions_to_remove(16, removed, 2.0, 1.0) for removed in (0.0, 0.25, 0.5, 1.0)] == [0, 1, 4, 16]
    # the larger MLP is, the fewer; a larger alpha makes it more: 0.5 ** (3 / 1.5) is a quarter, 0.5 ** (3 / 3) a half
    assert [attentions_to_remove(8, 0.5, 3.0, alpha) for alpha in (1.5, 3.0)] == [2, 4]


@pytest.fixture
def model(tiny_llama):
    return tiny_llama(num_hidden_layers=6, num_attention_heads=8, num_key_value_heads=4)


@pytest.fixture
def ids():
    return torch.randint(0, 64, (5, 24), generator=torch.Generator().manual_seed(1))


def activations(model, sample):
    seen, handles = [], []
    for layer in model.model.layers:
        handles.append(layer.mlp.down_proj.register_forward_pre_hook(lambda m, args: seen.append(args[0][0])))
    with torch.no_grad():
        model(sample[None])
    for handle in handles:
        handle.remove()
    return seen


def perplexity(model, sample):
    with torch.no_grad():
        logits = model(sample[None], use_cache=False).logits
    return F.cross_entropy(logits[0, :-1], sample[1:]).exp().item()


def without(model, gone):
    """The attentions in `gone` add nothing."""
    clone = copy.deepcopy(model)
    for index in gone:
        clone.model.layers[index].self_attn.forward = lambda hidden_states, **_: (0, None)
    return clone


def test_both_stages_against_the_released_procedure(model, ids):
    pruned = secateur.prune(model, method="2ssp", target="60%", data=ids)
    attention = sum(p.numel() for p in model.model.layers[0].self_attn.parameters())
    mlp = sum(p.numel() for p in model.model.layers[0].mlp.parameters())
    count = round(6 * 0.4 ** (mlp / attention / 1.5))
    wanted = 0.4 * (attention + mlp) - count * attention / 6  # of one MLP
    narrow = copy.deepcopy(model)
    for index in range(6):
        norms = torch.stack([activations(model, sample)[index].norm(dim=0, p=2) for sample in ids]).mean(0)
        kept = pruned.plan.keep[f"model.layers.{index}.mlp:neurons"]
        assert len(kept) == pytest.approx(48 * (1 - wanted / mlp), abs=1)
        assert set(kept.tolist()) == set(norms.topk(len(kept)).indices.tolist())
        with torch.no_grad():
            gone = sorted(set(range(48)) - set(kept.tolist()))
            narrow.model.layers[index].mlp.down_proj.weight[:, gone] = 0
    removed: list[int] = []
    for _ in range(count):
        left = [index for index in range(6) if index not in removed]
        removed.append(min(left, key=lambda index: perplexity(without(narrow, [*removed, index]), ids[0])))
    assert count == 2
    kept = [index for index in range(6) if index not in removed]
    assert pruned.plan.keep["model.layers:attentions"].tolist() == kept
    expected = without(narrow, removed)(ids, use_cache=False).logits
    assert torch.allclose(pruned.model(ids).logits, expected, atol=1e-5)


def test_the_count_can_be_given(model, ids):
    none = secateur.prune(model, method="2ssp", target="70%", data=ids, attentions=0)
    assert "model.layers:attentions" not in none.plan.keep
    three = secateur.prune(model, method="2ssp", target="70%", data=ids, attentions=3)
    assert len(three.plan.keep["model.layers:attentions"]) == 3
    with pytest.raises(SecateurError, match="7 attentions can't leave of 6"):
        secateur.prune(model, method="2ssp", target="70%", data=ids, attentions=7)


def test_more_attentions_than_the_formula_where_neurons_are_too_few(model, ids):
    """An attention has 3072 weights, an MLP 4608. Of 46,080 a tenth may stay, and two attentions are more than that."""
    assert attentions_to_remove(6, 0.9, 1.5, 0.5) == 4
    pruned = secateur.prune(model, method="2ssp", target="10%", data=ids, alpha=0.5)
    assert pruned.report["met"] and len(pruned.plan.keep["model.layers:attentions"]) == 1
    with pytest.raises(SecateurError, match="can't be met"):
        secateur.prune(model, method="2ssp", target="params<=1%", data=ids)


def test_rounds_keep_what_left(model, ids):
    once = secateur.prune(model, method="2ssp", target="60%", data=ids)
    twice = secateur.prune(model, method="2ssp", target="60%", data=ids, schedule="iterative:2")
    assert {n: len(u) for n, u in once.plan.keep.items()} == {n: len(u) for n, u in twice.plan.keep.items()}
    assert not any(module._forward_hooks for module in twice.model.modules())
