"""MaskSparsity: the worked examples of its spec sheet, its invariants, and runs on real digits."""

import copy

import pytest
import torch
from torch import nn

import secateur
from secateur import SecateurError
from secateur.measure.vision import predictions
from secateur.method import make_method
from secateur.solvers.batchnorm import reestimate_batchnorm
from secateur.tasks import load_task
from secateur.training import fit
from secateur.training.recipe import Recipe
from secateur.training.scales import (
    Sparsify,
    above,
    batchnorm_scales,
    gammas,
    of_layers,
    ot_threshold,
    penalty_gradient,
    separation,
    vote,
)

GAMMA, GRADIENT, KEEP = [0.9, -0.02, 0.3, 0.05], [0.1, 0.2, -0.1, 0.0], [1, 0, 1, 0]


class Scales(nn.Module):
    """BatchNorm of four channels whose task gradient is the sheet's."""

    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm1d(4)
        self.bn.weight.data = torch.tensor(GAMMA)

    def forward(self, x):
        return self.bn(x)


def one_step(keep=KEEP, lam=5e-4, kind="l1", **recipe):
    model, seen = Scales(), {}
    hooks = [Sparsify({"bn.weight": model.bn.weight}, {"bn.weight": torch.tensor(keep).bool()}, lam, kind)]
    hooks.append(lambda state: seen.update(gradient=model.bn.weight.grad.clone()))
    fit(
        model,
        (torch.zeros(2, 4), torch.zeros(2)),
        steps=1,
        loss=lambda m, batch: (m.bn.weight * torch.tensor(GRADIENT)).sum(),
        after_backward=hooks,
        recipe=Recipe(
            optimizer="sgd", batch=2, lr_schedule="constant", warmup=0, clip=0, lr=0.1, decay="all", **recipe
        ),
    )
    return seen["gradient"].tolist(), model.bn.weight.tolist()


# ---------------------------------------------------------------- the sheet's examples


def test_the_penalty_joins_the_gradient_of_what_will_leave():
    gradient, after = one_step(momentum=0.0)
    assert gradient == pytest.approx([0.1, 0.1995, -0.1, 0.0005])
    assert after == pytest.approx([0.89, -0.03995, 0.31, 0.04995])


def test_the_first_nesterov_step_with_weight_decay():
    _, after = one_step(momentum=0.9, nesterov=True, weight_decay=1e-4)
    assert after == pytest.approx([0.880983, -0.057905, 0.318994, 0.049904], abs=1e-6)


def test_other_penalties():
    gamma = torch.tensor([0.9, -0.02, 0.0, 3e-5])
    assert penalty_gradient(gamma).tolist() == [1, -1, 0, 1]
    assert torch.equal(penalty_gradient(gamma, "l2"), gamma)
    smooth = penalty_gradient(gamma, "smooth-l1", lr_lambda=5e-5)
    assert smooth.tolist() == pytest.approx([1, -1, 0, 3e-5])


def masks(*rows):
    return torch.tensor(rows).bool()


def test_members_of_a_group_vote():
    """Counts 0 2 3 2 0, the least pruned member loses 2: three of three agree on one channel only, two of three on three."""
    assert vote(masks([1, 1, 0, 0, 1], [1, 0, 0, 1, 1], [1, 0, 0, 0, 1])).int().tolist() == [1, 0, 0, 0, 1]


@pytest.mark.parametrize(
    ("sizes", "stays"), [([3.0, 9.0, 1.0], 0), ([1.0, 9.0, 3.0], 2), ([2.0, 9.0, 2.0], 0)]
)
def test_one_channel_stays_where_all_would_leave(sizes, stays):
    """Counts 1 2 1: of the two with fewest votes the one of larger |gamma|, else the first."""
    keep = vote(masks([0, 0, 1], [1, 0, 0]), torch.tensor([sizes, sizes]))
    assert keep.nonzero().flatten().tolist() == [stays]


def test_a_member_that_loses_nothing_saves_the_whole_group():
    assert vote(masks([1, 1, 1], [0, 0, 1], [0, 1, 1])).all()


def test_a_group_of_one_keeps_its_own_mask():
    assert vote(masks([1, 0, 1])).tolist() == [True, False, True]


def test_the_ot_threshold():
    gamma = torch.tensor([0.001, 0.002, 0.004, 0.5, 0.8, 0.9])
    assert ot_threshold(gamma) == pytest.approx(0.252)
    assert (
        above(gamma, ot_threshold(gamma)).tolist() == above(gamma, 0.01).tolist() == [False] * 3 + [True] * 3
    )
    assert ot_threshold(torch.tensor([1.0, 1.0])) == 0 and ot_threshold(torch.tensor([5e-4, 1e-5])) == 1


def test_no_layer_is_emptied_and_of_equals_the_first_stays():
    assert above(torch.tensor([0.1, -0.3, 0.3]), 1.0).tolist() == [False, True, False]


# ---------------------------------------------------------------- invariants


def small(seed=0):
    torch.manual_seed(seed)
    return load_task("digits").build()


def train(model, hooks=(), steps=6):
    task = load_task("digits")
    fit(
        model,
        task.train,
        steps=steps,
        recipe=Recipe(optimizer="sgd", lr=0.05, batch=32),
        after_backward=hooks,
    )
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def equal(first, second):
    return all(torch.equal(first[name], second[name]) for name in first)


def test_a_mask_of_ones_or_lambda_zero_is_ordinary_training():
    plain = train(small())
    for value, lam in ((True, 0.1), (False, 0.0)):
        model = small()
        scales = batchnorm_scales(model)
        keep = {name: torch.full_like(g, value, dtype=torch.bool) for name, g in scales.items()}
        assert equal(train(model, [Sparsify(scales, keep, lam)]), plain)
    model = small()
    assert equal(train(model, [Sparsify(batchnorm_scales(model), {}, 0.1)]), plain)


def test_a_mask_of_zeros_is_network_slimming():
    model, plain = small(), small()
    scales = batchnorm_scales(model)
    keep = {name: torch.zeros_like(g, dtype=torch.bool) for name, g in scales.items()}

    def slim(state):
        for module in state.model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.grad += 0.1 * module.weight.detach().sign()

    assert equal(train(model, [Sparsify(scales, keep, 0.1)]), train(plain, [slim]))


def test_gradients_of_kept_scales_are_untouched():
    gradient, _ = one_step(keep=[1, 0, 1, 0], lam=0.3, momentum=0.0)
    assert torch.equal(torch.tensor(gradient)[[0, 2]], torch.tensor(GRADIENT)[[0, 2]])


def test_cutting_channels_of_zero_scale_and_bias_changes_nothing():
    model = small().eval()
    graph = secateur.trace(model, torch.zeros(1, 1, 8, 8))
    scales = batchnorm_scales(model)
    keep = {}
    for group in graph.prunable():
        if any(s.name in scales for s in group.slices):
            keep[group.name] = torch.arange(0, group.size, 2)
            for s in group.slices:
                if s.name in scales:
                    gone = s.index[1::2].flatten()
                    scales[s.name].data[gone] = 0
                    model.get_parameter(s.name.replace("weight", "bias")).data[gone] = 0
    x = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    cut = copy.deepcopy(model)
    secateur.surgery.cut_units(cut, graph, keep)
    with torch.no_grad():
        assert torch.allclose(cut(x), model(x), atol=1e-5)
    assert cut.conv1.out_channels == 8 and len(keep) == 3


@pytest.mark.needs_data
def test_coupled_batchnorms_share_a_mask_and_end_as_wide():
    """ResNet-20: what runs through the shortcuts; a few steps are enough to see the widths."""
    task = load_task("cifar10", train=64, test=8)
    pruned = secateur.train_prune(task, method="masksparsity", target="50%", steps=1, batch=8, tune=1.0)
    model = pruned.model
    assert model.bn1.num_features == 8
    for stage, width in ((model.layer1, 8), (model.layer2, 24), (model.layer3, 56)):
        assert {block.bn2.num_features for block in stage} == {width}
        assert {block.conv2.out_channels for block in stage} == {width}
    assert {block.bn1.num_features for block in model.layer3} == {32}
    graph, scales = pruned.graph, batchnorm_scales(task.build())
    units = {"conv1:channels": torch.arange(16) % 2 == 0}
    keep = of_layers({"conv1:channels": graph["conv1:channels"]}, units, scales)
    assert (
        len(keep) == 10
        and keep["layer2.0.bn2.weight"].tolist() == [True] * 8 + [True, False] * 8 + [True] * 8
    )
    assert gammas(graph["conv1:channels"], scales).shape == (10, 16)


# ---------------------------------------------------------------- whole runs


def digits_run(**settings):
    """Half of the channels; eight epochs, so lambda is larger than for a hundred."""
    recipe = {
        "optimizer": "sgd",
        "lr": 0.05,
        "clip": 0.0,
        "epochs": 8,
        "lam": 0.1,
        "tune_lr": 5e-3,
        "reestimate": 40,
    }
    settings = {"target": "50%", "seed": 0, **recipe, **settings}
    return secateur.train_prune(load_task("digits"), method="masksparsity", **settings)


@pytest.fixture(scope="module")
def uniform():
    return digits_run()


def test_masked_scales_vanish_and_the_cut_costs_nothing_but_statistics(uniform):
    sparse = uniform.report["phases"][0]
    assert sparse["phase"] == "sparse" and sparse["leaving_below_0.01"] == 1.0
    assert sparse["smallest_gamma_that_stays"] > 10 * sparse["largest_gamma_that_leaves"]
    assert abs(sparse["quality_after_the_cut"] - sparse["quality"]) < 0.01
    assert sparse["quality"] > 0.95
    assert [g["kept"] for g in uniform.report["groups"] if g["reason"] is None] == [8, 16, 16]


def test_kept_scales_and_accuracy_after_the_cut_are_above_those_of_global_slimming(uniform):
    """Slimming with the same lambda to the same widths: every scale regularised, then the smallest half of each leaves."""
    slimmed = load_task("digits")
    model = slimmed.pretrained()
    scales = batchnorm_scales(model)
    none = {name: torch.zeros_like(g, dtype=torch.bool) for name, g in scales.items()}
    recipe = slimmed.recipe.replace(optimizer="sgd", lr=0.05, clip=0.0)
    steps = round(8 * 1200 / recipe.batch)
    fit(
        model,
        slimmed.train,
        steps=steps,
        recipe=recipe,
        augment=slimmed.augment,
        after_backward=[Sparsify(scales, none, 0.1)],
    )
    graph = secateur.trace(model.eval(), slimmed.inputs)
    keep = {
        g.name: gammas(g, scales).mean(0).sort(descending=True).indices[: g.size // 2].sort().values
        for g in graph.prunable()
        if any(s.name in scales for s in g.slices)
    }
    secateur.surgery.cut_units(model, graph, keep)
    for name, slim in batchnorm_scales(model).items():
        assert uniform.model.get_parameter(name).abs().mean() > slim.abs().mean()
    reestimate_batchnorm(model, list(slimmed.train[0].split(64))[:16])
    assert uniform.report["phases"][0]["quality_after_the_cut"] > slimmed.quality(model)


def test_a_global_mask_meets_a_target_of_multiply_adds():
    pruned = digits_run(target="macs<=50%", mask="global", epochs=2)
    assert [row["phase"] for row in pruned.report["phases"]] == ["mask", "sparse", "tune"]
    assert (
        pruned.report["met"]
        and 0.45 < pruned.report["after"]["macs"] / pruned.report["before"]["macs"] <= 0.5
    )


@pytest.mark.parametrize("select", ["threshold", "ot"])
def test_thresholds_find_the_channels_of_the_mask_again(select, uniform):
    found = digits_run(select=select, tune=0.0)
    assert found.plan.keep.keys() == uniform.plan.keep.keys()
    assert all(torch.equal(units, uniform.plan.keep[name]) for name, units in found.plan.keep.items())


def test_by_position_the_first_channels_leave():
    pruned = digits_run(mask="position", epochs=0.2, target="66.5%")
    assert {name: units.tolist() for name, units in pruned.plan.keep.items()} == {
        "conv1:channels": list(range(6, 16)),
        "conv2:channels": list(range(11, 32)),
        "conv3:channels": list(range(11, 32)),
    }


def test_a_mask_by_threshold_takes_what_a_training_pushed_down():
    pruned = digits_run(mask="threshold", epochs=8, tune=0.0)
    assert 0 < pruned.report["after"]["params"] < pruned.report["before"]["params"]
    assert [row["phase"] for row in pruned.report["phases"]] == ["mask", "sparse"]


def test_the_cut_model_is_saved_and_its_plan_makes_it_again(uniform, tmp_path):
    uniform.plan.save(tmp_path)
    fresh = load_task("digits").pretrained()
    secateur.apply_plan(fresh, secateur.Plan.load(tmp_path))
    x = load_task("digits").train[0][:64]
    assert torch.equal(predictions(fresh, x), predictions(uniform.model, x))
    assert all(
        torch.equal(a, b) for a, b in zip(fresh.state_dict().values(), uniform.model.state_dict().values())
    )


def test_a_killed_run_goes_on_to_the_same_bits(tmp_path, monkeypatch):
    settings = {"epochs": 0.5, "every": 2}
    whole = digits_run(epochs=0.5)
    real, count = Sparsify.__call__, []

    def dies(self, state):
        count.append(1)
        if len(count) == 6:
            raise KeyboardInterrupt
        real(self, state)

    monkeypatch.setattr(Sparsify, "__call__", dies)
    with pytest.raises(KeyboardInterrupt):
        digits_run(**settings, resume=tmp_path / "run")
    monkeypatch.setattr(Sparsify, "__call__", real)
    resumed = digits_run(**settings, resume=tmp_path / "run")
    assert all(
        torch.equal(a, b)
        for a, b in zip(whole.model.state_dict().values(), resumed.model.state_dict().values())
    )


def test_an_untrained_network_is_trained_first():
    torch.manual_seed(0)
    task = load_task("digits")
    task.pretrained = None
    pruned = secateur.train_prune(task, method="masksparsity", target="50%", steps=4, lam=0.02)
    assert [row["phase"] for row in pruned.report["phases"]] == ["baseline", "sparse", "tune"]


def test_mistakes_are_named():
    plain = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    data = (torch.randn(8, 4), torch.arange(8) % 2)
    with pytest.raises(SecateurError, match="no BatchNorm"):
        secateur.train_prune(plain, method="masksparsity", target="50%", data=data, steps=1)
    for settings in ({"lam": -1.0}, {"penalty": "l3"}, {"mask": "all"}, {"tune_lr": 0.0}):
        with pytest.raises(SecateurError):
            make_method("masksparsity", **settings)
    with pytest.raises(SecateurError, match="N:M|2:4"):
        secateur.train_prune(load_task("digits"), method="masksparsity", target="2:4", steps=1)


def test_how_well_the_scales_have_parted():
    scales = {
        "a": nn.Parameter(torch.tensor([-0.5, 0.001, -0.02, 0.01])),
        "b": nn.Parameter(torch.tensor([-0.3, 0.4])),
    }
    found = separation(scales, {"a": torch.tensor([True, False, False, False])})
    assert found == pytest.approx(
        {"largest_gamma_that_leaves": 0.02, "leaving_below_0.01": 1 / 3, "smallest_gamma_that_stays": 0.3}
    )
    assert separation(scales, {}) == {}
