"""ISS-P: the worked examples of its spec sheet, what must never happen, and a run on real digits."""

import copy
import dataclasses
import math

import pytest
import torch
from torch import nn

import secateur
from secateur import SecateurError
from secateur.methods.iss_p import IssP, Shrink, smallest
from secateur.training import fit
from secateur.training.masks import below_sampled_threshold, fit_pattern, smallest_of_groups
from secateur.training.recipe import Recipe

W = [0.9, -0.02, 0.3, 0.05, -0.6, 0.01, 0.2, -0.08, 0.4, 0.03]


def shrink_of(tensor, ratio=0.5, **settings):
    return Shrink({"w": nn.Parameter(torch.as_tensor(tensor))}, ratio, **settings)


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 3))


def data(seed=0, rows=64):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 8, generator=generator)
    return x, (x[:, :3] + 0.1 * torch.randn(rows, 3, generator=generator)).argmax(1)


def run(model=None, target="20%", steps=30, **settings):
    settings = {"optimizer": "adam", "lr": 1e-2, "batch": 16, "clip": 0.0, **settings}
    return secateur.train_prune(
        model or net(), method="iss-p", target=target, data=data(), steps=steps, **settings
    )


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def equal(first, second):
    return all(torch.equal(first[name], second[name]) for name in first)


# ---------------------------------------------------------------- the sheet's examples


def test_half_of_ten_weights_shrink_by_a_twentieth():
    shrink = shrink_of(W)
    assert shrink.chosen("w").nonzero().flatten().tolist() == [1, 3, 5, 7, 9]
    shrink()
    expected = [0.9, -0.019, 0.3, 0.0475, -0.6, 0.0095, 0.2, -0.076, 0.4, 0.0285]
    assert shrink.weights["w"].tolist() == pytest.approx(expected)


@pytest.mark.parametrize(("calls", "factor"), [(10, 0.5987), (50, 0.0769), (100, 0.00592)])
def test_without_training_the_set_shrinks_geometrically(calls, factor):
    shrink = shrink_of(W)
    for _ in range(calls):
        shrink()
    after = shrink.weights["w"].detach()
    chosen = torch.tensor([1, 3, 5, 7, 9])
    assert (after / torch.tensor(W))[chosen].tolist() == pytest.approx([factor] * 5, rel=2e-3)


def test_a_thousandth_takes_135_calls():
    shrink = shrink_of([1.0, 0.5])
    counts = 0
    while shrink.weights["w"][1].item() > 0.5e-3:
        shrink()
        counts += 1
    assert counts == 135


def test_two_of_four_in_runs_of_the_flattened_tensor():
    flat = torch.tensor([0.9, 0.1, 0.2, 0.3, 0.05, 0.4, 0.6, 0.01])
    assert smallest_of_groups(flat, 2, 4).nonzero().flatten().tolist() == [1, 2, 4, 7]
    assert torch.equal(smallest_of_groups(flat.view(2, 2, 2), 2, 4).flatten(), smallest_of_groups(flat, 2, 4))


def test_a_pattern_grows_until_it_divides_every_layer():
    assert fit_pattern(19, 20, [576, 2 * 576, 36 * 576]) == (23, 24)
    assert fit_pattern(19, 20, [10800]) == (19, 20)
    with pytest.raises(SecateurError, match="greatest common divisor"):
        fit_pattern(2, 4, [9, 12])


@pytest.mark.parametrize(
    ("numel", "ratio", "count"), [(1000, 0.999, 995), (100, 0.99, 99), (10, 0.5, 5), (7, 0.5, 4)]
)
def test_as_many_as_the_ratio_says_up_to_a_cap(numel, ratio, count):
    assert int(smallest(torch.rand(numel) + 0.1, ratio).sum()) == count


def test_equal_weights_are_told_apart_by_their_index():
    assert smallest(torch.tensor([0.0, 1.0, -0.0, 0.0, 1.0]), 0.4).tolist() == [
        True,
        False,
        True,
        False,
        False,
    ]


def test_the_sampled_threshold_is_close_to_the_exact_set():
    weight = torch.randn(200, 300, generator=torch.Generator().manual_seed(0))
    found = below_sampled_threshold(weight, 0.9, 32_400, torch.Generator().manual_seed(1))
    assert abs(found.float().mean().item() - 0.9) < 0.01
    assert (found != smallest(weight, 0.9)).float().mean() < 0.01


# ---------------------------------------------------------------- invariants


def test_the_call_keeps_signs_and_the_other_weights_bit_for_bit():
    weight = torch.randn(40, 50, generator=torch.Generator().manual_seed(0))
    shrink = shrink_of(weight.clone(), 0.9)
    chosen = shrink.chosen("w")
    again = shrink_of(weight.clone(), 0.9)
    shrink()
    again()
    after = shrink.weights["w"].detach()
    assert int(chosen.sum()) == 1800 and torch.equal(after, again.weights["w"].detach())
    assert torch.equal(after[~chosen], weight[~chosen]) and torch.equal(after.sign(), weight.sign())
    assert torch.equal(after[chosen], weight[chosen] * 0.95)
    hard = shrink_of(weight.clone(), 0.9, alpha=0.0)
    hard()
    assert torch.equal(hard.weights["w"].detach(), weight.masked_fill(chosen, 0))


@pytest.mark.parametrize("settings", [{"alpha": 1.0}, {"ratio": 0.0}])
def test_alpha_one_or_nothing_to_prune_is_dense_training(settings):
    ratio = settings.pop("ratio", 0.8)
    dense, soft = net(), net()
    recipe = Recipe(optimizer="adam", lr=1e-2, batch=16)
    fit(dense, data(), steps=12, recipe=recipe)
    hook = Shrink(dict(soft.named_parameters()), ratio, **settings)
    fit(soft, data(), steps=12, recipe=recipe, after_step=[hook])
    assert equal(state(dense), state(soft))


def test_the_set_is_that_of_the_weights_after_the_step():
    model = net()
    seen = []

    class Spy(Shrink):
        def __call__(self, step_state=None):
            after_step = {name: w.detach().clone() for name, w in self.weights.items()}
            super().__call__(step_state)
            for name, before in after_step.items():
                changed = self.weights[name].detach() != before
                seen.append(torch.equal(changed, smallest(before, 0.8)))

    weights = {"0.weight": model[0].weight, "2.weight": model[2].weight}
    fit(model, data(), steps=5, optimizer="adam", lr=1e-2, batch=16, after_step=[Spy(weights, 0.8)])
    assert len(seen) == 10 and all(seen)


@pytest.mark.parametrize("target", ["20%", "1:4"])
def test_zeros_stay_and_every_layer_has_as_many_as_it_should(target):
    pruned = run(target=target)
    for name, mask in pruned.plan.masks.items():
        weight = pruned.model.get_parameter(name)
        assert torch.equal(weight == 0, ~mask)
        if target == "20%":
            assert int((~mask).sum()) == math.ceil(0.8 * mask.numel())
        else:
            assert (mask.flatten().view(-1, 4).sum(1) == 1).all()
    assert set(pruned.plan.masks) == {"0.weight", "2.weight"} and pruned.report["met"]
    assert [row["phase"] for row in pruned.report["phases"]] == ["shrink", "tune"]


def test_the_stage_has_a_constant_rate_and_its_moments_go_on(monkeypatch):
    import secateur.training.job as engine

    calls = []

    def spied(*args, **kwargs):
        calls.append((kwargs["steps"], kwargs["recipe"].lr_schedule, kwargs["moments"] is not None))
        return fit(*args, **kwargs)

    monkeypatch.setattr(engine, "fit", spied)
    run(steps=30, stage=0.4, lr_schedule="cosine")
    assert calls == [(12, "constant", False), (18, "cosine", True)]


def test_same_seed_same_weights_and_the_plan_can_be_applied_again(tmp_path):
    first, second = run(seed=3), run(seed=3)
    assert equal(state(first.model), state(second.model)) and first.plan == second.plan
    first.plan.save(tmp_path)
    fresh = net(seed=9)
    secateur.apply_plan(fresh, secateur.Plan.load(tmp_path))
    assert equal(state(fresh), state(first.model))


def test_fast_thresholds_end_with_exact_counts_too():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 3))
    masks = run(model, sample=100).plan.masks
    assert int(masks["0.weight"].sum()) == 512 - math.ceil(0.8 * 512)


def test_a_killed_run_goes_on_to_the_same_bits(tmp_path, monkeypatch):
    whole = run(steps=20, sample=10)
    real = Shrink.__call__

    def dies(self, step_state=None):
        if step_state.step == 5:
            raise KeyboardInterrupt
        real(self, step_state)

    monkeypatch.setattr(Shrink, "__call__", dies)
    with pytest.raises(KeyboardInterrupt):
        run(steps=20, sample=10, resume=tmp_path / "run", every=2)
    monkeypatch.setattr(Shrink, "__call__", real)
    resumed = run(steps=20, sample=10, resume=tmp_path / "run", every=2)
    assert equal(state(whole.model), state(resumed.model))


def test_mistakes_are_named():
    for settings, match in (
        ({"alpha": 1.5}, "alpha"),
        ({"stage": 1.0}, "stage"),
        ({"skip": ("*",)}, "no weight is left"),
        ({"target": "1:13"}, "common divisor"),
        ({"steps": 1}, "no training"),
        ({"target": "macs<=50%"}, "macs"),
    ):
        with pytest.raises(SecateurError, match=match):
            run(**settings)


def test_layers_can_be_skipped():
    pruned = run(skip=("2.*",))
    assert set(pruned.plan.masks) == {"0.weight"} and (pruned.model[2].weight != 0).all()


# ---------------------------------------------------------------- behaviour


def test_against_a_constant_push_a_weight_of_the_set_settles_at_nineteen_rates():
    """Steps of Adam are about lr: w = 0.95 (w + lr) at w = 19 lr."""
    shrink = shrink_of([0.1, 1.0])
    weight = shrink.weights["w"]
    for _ in range(400):
        with torch.no_grad():
            weight += 1e-3
        shrink()
    assert weight[0].item() == pytest.approx(19e-3, rel=1e-3)
    assert weight[1].item() == pytest.approx(1.4, rel=1e-3)


def test_soft_shrinkage_ends_below_hard_thresholding_on_a_regression():
    """The sheet's 20-32-5 network, 80 % pruned, shorter: 2 seeds, 400 + 200 steps; only the mean is compared."""
    ends = {0.95: 0.0, 0.0: 0.0}
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(256, 20, generator=generator)
        teacher = [
            torch.randn(20, 32, generator=generator) * 0.5,
            torch.randn(32, 5, generator=generator) * 0.5,
        ]
        y = (x @ teacher[0]).relu() @ teacher[1]
        start = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 5))
        for p in start.parameters():
            p.data = 0.2 * torch.randn(p.shape, generator=generator)
        for alpha in ends:
            pruned = secateur.train_prune(
                copy.deepcopy(start),
                method="iss-p",
                target="20%",
                data=(x, y),
                loss=lambda model, batch: (model(batch[0]) - batch[1]).square().mean(),
                quality=lambda model, x=x, y=y: -(model(x) - y).square().mean().item(),
                steps=600,
                alpha=alpha,
                stage=2 / 3,
                optimizer="adam",
                lr=2e-3,
                batch=256,
                clip=0.0,
                lr_schedule="constant",
                warmup=0.0,
            )
            ends[alpha] -= pruned.report["after"]["quality"] / 2
    assert ends[0.95] < 0.9 * ends[0.0]


def test_hyperparameters_are_the_papers():
    assert dataclasses.asdict(IssP()) == {"alpha": 0.95, "stage": 1 / 3, "sample": 0, "skip": ()}
