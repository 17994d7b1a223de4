"""The worked examples and invariants of vtrans, and draws of the gates for each token."""

import copy

import pytest
import torch
from torch import nn

import secateur
from secateur import SecateurError
from secateur.gates import Gaussian, HardConcrete, Lagrangian, place
from secateur.graph import trace
from secateur.pruning.allocate import nearest_multiple
from secateur.surgery import cut_units
from secateur.training.batches import part_of


def law(mu=(1.0, 0.2, 0.05), log_variance=(-9.0, -4.0, -5.0), sharpness=10.0):
    made = Gaussian(len(mu), sharpness)
    with torch.no_grad():
        made.mu.copy_(torch.tensor(mu))
        made.log_variance.copy_(torch.tensor(log_variance))
    return made


def test_the_mask_of_the_sheet():
    made = law()
    assert made.log_alpha().tolist() == pytest.approx([-9.0, -0.781124, 0.991461], abs=1e-5)
    assert (made.value() != 0).tolist() == [True, True, False]
    assert made.value().tolist() == pytest.approx([1.0, 0.2, 0.0])
    assert made.kl().item() == pytest.approx(5.236861, abs=1e-5)
    each = [law((m,), (v,)).kl().item() for m, v in ((1.0, -9.0), (0.2, -4.0), (0.05, -5.0))]
    assert each == pytest.approx([4.500021, 0.579057, 0.157782], abs=1e-5)
    assert made.keep().tolist() == pytest.approx([1.0, 0.999595, 0.000049], abs=1e-6)
    assert law(sharpness=1.0).keep().tolist() == pytest.approx([0.999877, 0.685922, 0.270624], abs=1e-6)


def test_the_multipliers_of_the_sheet_ascend():
    held = Lagrangian()
    with torch.no_grad():
        held.linear.fill_(0.4)
        held.square.fill_(2.0)
    loss = held(torch.tensor(0.3), 0.5)
    assert loss.item() == pytest.approx(-0.08 + 0.08, abs=1e-7)
    loss.backward()
    assert (held.linear.grad.item(), held.square.grad.item()) == pytest.approx((-0.2, 0.04))
    assert held.groups(0.1)["maximize"] is True


def test_the_bottleneck_shrinks_means_and_grows_noise():
    made = law((0.5, -0.5), (-2.0, -2.0))
    made.kl().backward()
    assert made.mu.grad.sign().tolist() == [1.0, -1.0]
    assert (made.log_variance.grad < 0).all()
    assert law((1e-6,), (0.0,)).kl().item() < 1e-6
    assert law((1.0,), (-9.0,)).kl() > law((0.5,), (-9.0,)).kl()


def test_a_sharper_count_is_the_hard_one():
    hard = float((law().value() != 0).sum())
    assert abs(law(sharpness=1000.0).keep().sum().item() - hard) < 1e-4
    assert abs(law(sharpness=1.0).keep().sum().item() - hard) > 0.04


def test_counts_are_rounded_to_multiples():
    assert [nearest_multiple(n, 128, 4096) for n in (3000, 100, 70, 63)] == [2944, 128, 128, 128]
    assert nearest_multiple(4090, 128, 4000) == 4000


@pytest.fixture
def model(tiny_llama):
    return tiny_llama(num_hidden_layers=2, hidden_size=32, num_attention_heads=4, num_key_value_heads=2)


KINDS = ("hidden", "kv_groups", "neurons")


def gates(model, ids, of=lambda group: Gaussian(group.size), **settings):
    return place(model, trace(model, ids), of, KINDS, rows=True, **settings)


def ids_for(model, rows=3, length=7):
    return torch.randint(
        0, model.config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(0)
    )


def test_without_noise_and_with_means_of_one_it_is_the_network(model):
    ids = ids_for(model)
    gated = gates(model, ids)
    assert set(gated.by_rows) == set(gated.points)
    for made in gated.laws:
        nn.init.ones_(made.mu)
        nn.init.constant_(made.log_variance, -200.0)
    with torch.no_grad():
        expected = model.eval()(ids).logits
        assert torch.equal(gated.train()(ids).logits, expected)


@pytest.mark.parametrize("make", [lambda g: Gaussian(g.size), lambda g: HardConcrete(g.size, start=0.0)])
def test_every_token_has_draws_of_its_own_and_every_channel_of_a_head(model, make):
    ids = ids_for(model)
    gated = gates(model, ids, make).train()
    seen = {}
    for path in ("model.layers.0.mlp.down_proj", "model.layers.0.self_attn.o_proj"):
        module = model.get_submodule(path)
        given = torch.ones(2, 5, module.in_features)

        def before(module, args, path=path):
            seen[path] = args[0]

        with torch.no_grad(), gated._rows():
            hook = module.register_forward_pre_hook(before)
            module(given)
            hook.remove()
        assert len({tuple(row.tolist()) for row in seen[path].flatten(0, 1)}) == 10
    heads = seen["model.layers.0.self_attn.o_proj"].reshape(10, 2, -1)
    assert (heads.std(-1) > 0).all()
    # behind an embedding and each producer of the stream
    sites = {name: [type(site.module).__name__ for site in found] for name, found in gated.by_rows.items()}
    assert sites["stem:hidden"] == ["Embedding"] + ["Linear"] * 4


def test_the_mean_over_draws_is_the_mean_times_the_input(model):
    gated = gates(model, ids_for(model)).train()
    name = next(n for n in gated.by_rows if "neurons" in n)
    made, module = gated.by_group()[name], gated.by_rows[name][0].module
    with torch.no_grad():
        made.mu.copy_(torch.linspace(0.2, 1.2, made.units))
        made.log_variance.fill_(-1.0)
    seen = []
    hook = module.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    with torch.no_grad(), gated._rows():
        hook.remove()
        hook = module.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
        module(torch.full((20_000, module.in_features), 2.0))
    hook.remove()
    torch.testing.assert_close(seen[0].mean(0), 2 * made.mu.detach(), atol=0.03, rtol=0)


def test_cut_with_folded_means_it_computes_what_the_masks_decide(model):
    """Heads and neurons: norms mix the stream, whose width they average over."""
    ids = ids_for(model)
    graph = trace(model, ids)
    gated = place(model, graph, lambda g: Gaussian(g.size), ("kv_groups", "neurons"), rows=True)
    keep = {}
    with torch.no_grad():
        for name, made in gated.by_group().items():
            made.mu.uniform_(0.5, 1.5)
            made.log_variance[::2] = 3.0  # every other unit drowns
            keep[name] = (made.value() != 0).nonzero().flatten()
        expected = gated.eval()(ids).logits
        gated.fold()
        torch.testing.assert_close(model.eval()(ids).logits, expected)
        small = copy.deepcopy(model)
        cut_units(small, graph, keep)
        torch.testing.assert_close(small(ids).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kinds", [KINDS, ("hidden",)])
def test_what_is_decided_and_folded_is_what_was_trained(tiny_llama, tied, kinds):
    """Without noise, whatever the means are; the head is the embedding, or isn't."""
    model = tiny_llama(
        num_hidden_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    ids = ids_for(model)
    gated = place(model, trace(model, ids), lambda g: Gaussian(g.size), kinds, rows=True)
    with torch.no_grad():
        for made in gated.laws:
            made.mu.uniform_(0.5, 1.5)
            made.log_variance.fill_(-100.0)
        trained = gated.train()(ids).logits
        torch.testing.assert_close(gated.eval()(ids).logits, trained, rtol=1e-4, atol=1e-5)
        gated.fold()
        torch.testing.assert_close(model.eval()(ids).logits, trained, rtol=1e-4, atol=1e-5)


def test_linear_layers_of_transformers_that_lie_turned_draw_for_each_token_too():
    from transformers import GPT2Config, GPT2LMHeadModel

    nothing = {
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32, **nothing)
    model = GPT2LMHeadModel(config).eval()
    ids = torch.randint(0, 64, (2, 6), generator=torch.Generator().manual_seed(0))
    gated = place(model, trace(model, ids), lambda g: Gaussian(g.size), ("neurons", "heads"), rows=True)
    assert set(gated.by_rows) == set(gated.points) and not any(gated._loose.values())
    with torch.no_grad():
        for made in gated.laws:
            made.mu.uniform_(0.5, 1.5)
            made.log_variance.fill_(-100.0)
        torch.testing.assert_close(gated.train()(ids).logits, gated.eval()(ids).logits, rtol=1e-4, atol=1e-5)


SETTINGS = {
    "method": "vtrans", "target": "60%", "steps": 60, "batch": 8, "optimizer": "adamw", "lr": 1e-3, "warmup": 0.0,
    "kl": 1e-3, "mask_lr": 0.3, "multiplier_lr": 1.0,
}  # fmt: skip


def test_masks_alone_leave_the_weights_and_reach_the_share(model):
    ids = ids_for(model, 48, 12)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    pruned = secateur.train_prune(model, ids[:2], data=ids, masks_only=True, **SETTINGS)
    row = pruned.report["phases"][0]
    assert row["share_expected"] < 0.8 and pruned.report["met"]
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    # what is left of a matrix is the dense one's entries times two means: rank one apart
    kept = pruned.plan.keep["model.layers.0.mlp:neurons"]
    hidden = pruned.plan.keep["stem:hidden"]
    small, dense = (
        pruned.model.get_parameter("model.layers.0.mlp.down_proj.weight"),
        before["model.layers.0.mlp.down_proj.weight"][hidden][:, kept],
    )
    ratio = (small / dense).detach().double()
    assert torch.linalg.svdvals(ratio)[1] < 1e-3 * torch.linalg.svdvals(ratio)[0]


def test_the_published_threshold_may_miss_the_target_and_says_so(model):
    ids = ids_for(model, 48, 12)
    settings = {**SETTINGS, "steps": 2, "select": "threshold"}
    pruned = secateur.train_prune(model, ids[:2], data=ids, masks_only=True, **settings)
    assert not pruned.report["met"] and not pruned.plan.keep
    assert any("train for longer" in note for note in pruned.report["notes"])


def test_data_and_distillation(model):
    ids = ids_for(model, 40, 12)
    pruned = secateur.train_prune(
        model,
        ids[:2],
        data=ids,
        data_share=0.1,
        distil=0.5,
        distil_states=0.1,
        tune=0.1,
        **{**SETTINGS, "batch": 4},
    )
    assert [row["phase"] for row in pruned.report["phases"]] == ["masks", "tune"]
    assert torch.equal(part_of(ids, 1.0, torch.Generator()), ids)
    assert len(part_of(ids, 0.1, torch.Generator())) == 4
    assert len(part_of([1, 2, 3], 0.01, torch.Generator())) == 1
    assert len(part_of({"input_ids": ids}, 0.5, torch.Generator())["input_ids"]) == 20


def test_nonsense_is_refused(model):
    ids = ids_for(model, 8, 12)
    for wrong in ({"data_share": 0.0}, {"mask_lr": -1.0}, {"sharpness": 0.0}, {"select": "best"}):
        with pytest.raises(SecateurError, match="vtrans"):
            secateur.train_prune(model, ids[:2], data=ids, **{**SETTINGS, **wrong})
