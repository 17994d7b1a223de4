"""Gradients and Fisher values against autograd, and what `collect` leaves behind."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from secateur import SecateurError
from secateur.graph.blocks import every_matrix, find_matrices
from secateur.stats.collect import collect
from secateur.stats.record import _ExpertInputs


def squared(model, batch):
    return model(batch).square().mean()


def test_gradient_is_the_mean_over_batches_and_fisher_over_samples():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    batches = [torch.randn(2, 3), torch.randn(3, 3)]
    stats = collect(model, batches, {"gradient", "fisher"}, find_matrices(model), loss=squared)
    gradient = sum(torch.autograd.grad(squared(model, b), model[0].weight)[0] for b in batches) / 2
    samples = torch.cat(batches).split(1)
    fisher = sum(torch.autograd.grad(squared(model, s), model[0].weight)[0].square() for s in samples) / 5
    assert torch.allclose(stats["0.weight"].gradient, gradient, atol=1e-7)
    assert torch.allclose(stats["0.weight"].fisher, fisher, atol=1e-7)


def test_taylor_numbers_of_the_sheet():
    """weight-baselines: f = w2 (w1 x), loss 21.125; rows of w1, (sum gw)² and sum (gw)²."""
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, -2], [0.5, 1]]))
        model[1].weight.copy_(torch.tensor([[1.0, -1]]))
    data = [torch.tensor([[1.0, 2]])]
    stats = collect(
        model, data, {"gradient"}, find_matrices(model), loss=lambda m, x: 0.5 * (m(x) - 1).square().sum()
    )
    product = stats["0.weight"].gradient * model[0].weight.detach()
    assert product.sum(1).square().tolist() == [380.25, 264.0625]
    assert product.square().sum(1).tolist() == [718.25, 179.5625]


def test_language_models_have_a_loss_and_padding_does_not_count(tiny_llama):
    model = tiny_llama()
    ids = torch.randint(0, 64, (2, 10))
    matrices = find_matrices(model)
    stats = collect(model, ids, {"gradient"}, matrices, batch_size=2)
    name = "model.layers.0.mlp.up_proj.weight"
    logits = model(ids).logits[:, :-1].reshape(-1, 64)
    loss = nn.functional.cross_entropy(logits, ids[:, 1:].reshape(-1))
    expected = torch.autograd.grad(loss, model.get_parameter(name))[0]
    assert torch.allclose(stats[name].gradient, expected, atol=1e-6)
    padded = {
        "input_ids": torch.cat([ids, torch.zeros_like(ids[:, :3])], 1),
        "attention_mask": torch.cat([torch.ones_like(ids), torch.zeros_like(ids[:, :3])], 1),
    }
    again = collect(model, [padded], {"gradient"}, matrices)
    assert torch.allclose(again[name].gradient, expected, atol=1e-6)


def test_the_gradient_weighs_tokens_and_not_batches(tiny_llama):
    """Sequences of 30 and of 4 tokens: one by one, padded together and by hand it's the mean over all next tokens."""
    model = tiny_llama()
    long, short = torch.randint(0, 64, (1, 30)), torch.randint(0, 64, (1, 4))
    name = "model.layers.0.mlp.up_proj.weight"
    loss = sum(
        nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="sum")
        for ids in (long, short)
    )
    expected = torch.autograd.grad(loss / (29 + 3), model.get_parameter(name))[0]
    padded = torch.zeros(2, 30, dtype=torch.int64)
    padded[0], padded[1, :4] = long[0], short[0]
    mask = torch.ones_like(padded)
    mask[1, 4:] = 0
    labels = padded.masked_fill(mask == 0, -100)
    for batches in (
        [long, short],
        [{"input_ids": long}, {"input_ids": short}],
        [{"input_ids": long, "labels": long}, {"input_ids": short, "labels": short}],
        [{"input_ids": padded, "attention_mask": mask}],
        [{"input_ids": padded, "attention_mask": mask, "labels": labels}],
    ):
        found = collect(model, batches, {"gradient"}, find_matrices(model))[name].gradient
        assert torch.allclose(found, expected, atol=1e-6)


def test_labelled_batches_of_unequal_size_weigh_samples():
    torch.manual_seed(0)
    model = nn.Linear(3, 4)
    x, y = torch.randn(7, 3), torch.randint(0, 4, (7,))
    expected = torch.autograd.grad(nn.functional.cross_entropy(model(x), y), model.weight)[0]
    batches = [(x[:5], y[:5]), (x[5:], y[5:])]
    found = collect(model, batches, {"gradient"}, find_matrices(model))["weight"].gradient
    assert torch.allclose(found, expected, atol=1e-6)


def test_the_model_is_left_as_it_was(tiny_llama):
    model = tiny_llama().train()
    model.model.layers[0].eval()
    for parameter in model.model.layers[1].parameters():
        parameter.requires_grad_(False)
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    modes = {n: m.training for n, m in model.named_modules()}
    model.model.norm.weight.grad = torch.ones(32)
    collect(model, torch.randint(0, 64, (2, 8)), {"gradient", "fisher", "input_norm"}, find_matrices(model))
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert {n: m.training for n, m in model.named_modules()} == modes
    assert [n for n, p in model.named_parameters() if p.grad is not None] == ["model.norm.weight"]
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_without_a_loss_the_user_is_asked_for_one():
    model = nn.Linear(3, 2)
    with pytest.raises(SecateurError, match="loss="):
        collect(model, torch.randn(4, 3), {"gradient"}, find_matrices(model))
    with pytest.raises(SecateurError, match="scalar"):
        collect(model, torch.randn(4, 3), {"gradient"}, find_matrices(model), loss=lambda m, x: m(x))
    with pytest.raises(SecateurError, match="the loss is nan"):
        collect(
            model,
            torch.randn(4, 3),
            {"gradient"},
            find_matrices(model),
            loss=lambda m, x: m(x).sum() * torch.nan,
        )
    assert all(p.requires_grad for p in model.parameters())


def test_an_expert_s_rows_are_those_that_are_not_all_zero():
    matrix, seen = SimpleNamespace(parameter=torch.randn(2, 3, 5)), []
    rows = torch.tensor([[[1.0, 0, 2], [0, 0, 0], [0, 3, 0]], [[0, 0, 0], [0, 0, 4], [0, 0, 0]]])
    with _ExpertInputs([matrix], lambda matrix, expert, x: seen.append((expert, x.tolist()))):
        torch.bmm(rows, matrix.parameter)
        rows[0] @ matrix.parameter[1]
    assert seen == [(0, [[1, 0, 2], [0, 3, 0]]), (1, [[0, 0, 4]]), (1, rows[0].tolist())]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_an_input_that_is_no_number_names_the_layer(bad):
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    x = torch.randn(6, 3)
    assert set(collect(model, x, {"input_norm"}, find_matrices(model))) == {"0.weight", "2.weight"}
    x[4, 1] = bad
    with pytest.raises(SecateurError, match=r"0\.weight: its inputs hold NaN"):
        collect(model, x, {"input_norm"}, find_matrices(model))


def test_forwards_end_behind_the_last_block(tiny_llama):
    model = tiny_llama()
    ids, matrices, heads = torch.randint(0, 64, (3, 10)), find_matrices(model), []
    whole = [collect(model, one[None], {"input_norm"}, matrices) for one in ids]
    model.lm_head.register_forward_hook(lambda *_: heads.append(1))
    stats = collect(model, ids, {"input_norm"}, matrices, batch_size=1)
    assert len(heads) == 1  # the first forward is whole
    for name in matrices:
        parts = torch.stack([w[name].input_norm for w in whole]).square().mean(0).sqrt()
        assert torch.allclose(stats[name].input_norm, parts, rtol=1e-5)
    collect(model, ids, {"input_norm"}, {**matrices, **every_matrix(model)}, batch_size=1)
    assert len(heads) == 4  # the head's inputs are wanted


class Looped(nn.Module):
    """Three blocks, the first of which runs again at the end."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3))

    def forward(self, x):
        for block in [*self.blocks, self.blocks[0]]:
            x = block(x)
        return x


def test_forwards_are_whole_where_a_block_runs_twice():
    torch.manual_seed(0)
    model, x = Looped(), torch.randn(6, 4)
    stats = collect(model, x, {"input_mean"}, find_matrices(model), batch_size=2)
    out = x
    for block in model.blocks:
        out = block(out)
    assert torch.allclose(stats["blocks.0.0.weight"].input_mean, (x.mean(0) + out.mean(0)) / 2, atol=1e-6)
