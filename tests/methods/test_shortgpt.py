"""ShortGPT: the sheet's block influence, and the blocks it takes out."""

import itertools

import pytest
import torch

import secateur
from secateur.scores.influence import block_influence, cosine_change


def test_the_influence_of_the_sheet():
    x, y = torch.tensor([[1.0, 0], [3, 4]]), torch.tensor([[1.0, 1], [6, 8]])
    assert cosine_change(x, y).mean().item() == pytest.approx(0.1464466, abs=1e-6)


@pytest.fixture
def model(tiny_llama):
    return tiny_llama(num_hidden_layers=6)


@pytest.fixture
def ids():
    return torch.randint(0, 64, (5, 24), generator=torch.Generator().manual_seed(1))


def influence_by_hidden_states(model, ids):
    """From `output_hidden_states`, which holds every block's input; the last entry is normed, so taken apart."""
    last = []
    handle = model.model.layers[-1].register_forward_hook(
        lambda m, a, y: last.append(y[0] if isinstance(y, tuple) else y)
    )
    with torch.no_grad():
        states = [*model(ids, output_hidden_states=True).hidden_states[:-1], last[0]]
    handle.remove()
    cos = [(x * y).sum(-1) / x.norm(dim=-1) / y.norm(dim=-1) for x, y in itertools.pairwise(states)]
    return torch.stack([1 - c.mean() for c in cos])


def test_influence_against_hidden_states(model, ids):
    paths = [f"model.layers.{i}" for i in range(6)]
    found = block_influence(model, ids, paths)
    assert not any(m._forward_hooks for m in model.modules())
    assert torch.allclose(found.float(), influence_by_hidden_states(model, ids), atol=1e-5)


def test_padding_does_not_count(model, ids):
    paths = [f"model.layers.{i}" for i in range(6)]
    padded = torch.cat([ids, torch.zeros_like(ids)], 1)
    mask = torch.cat([torch.ones_like(ids), torch.zeros_like(ids)], 1)
    found = block_influence(model, [{"input_ids": padded, "attention_mask": mask}], paths)
    assert torch.allclose(found, block_influence(model, ids, paths), atol=1e-5)


def test_the_blocks_of_least_influence_leave_whole(model, ids):
    with torch.no_grad():  # blocks 1 and 4 hardly change their input
        for index in (1, 4):
            for linear in (
                model.model.layers[index].self_attn.o_proj,
                model.model.layers[index].mlp.down_proj,
            ):
                linear.weight.mul_(1e-3)
    before = influence_by_hidden_states(model, ids)
    assert set(before.topk(2, largest=False).indices.tolist()) == {1, 4}
    pruned = secateur.prune(model, method="shortgpt", target="66.67%", data=ids)
    assert pruned.plan.keep["model.layers:layers"].tolist() == [0, 2, 3, 5]
    assert len(pruned.model.model.layers) == pruned.model.config.num_hidden_layers == 4


def test_a_budget_between_two_depths_is_not_exceeded(model, ids):
    assert len(secateur.prune(model, method="shortgpt", target="60%", data=ids).model.model.layers) == 3
