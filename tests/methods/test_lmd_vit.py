"""LMD-ViT: the sheet's example, the losses, what must hold of the windows, and what is refused."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

import secateur
from secateur import SecateurError
from secateur.families.windowed import Predictor, Stage, WindowedUNet
from secateur.measure import macs
from secateur.methods import lmd_vit
from secateur.methods.lmd_vit import (
    LmdVit,
    balanced,
    check_masks,
    decide,
    pruning_loss,
)
from secateur.skipping.windows import window_means
from secateur.training.losses import reconstruction, similarity
from secateur.training.task import Task


def scores():
    """[1, 4, 4, 2] of the sheet: keep, drop."""
    keep, drop = torch.zeros(4, 4), torch.zeros(4, 4)
    keep[:2, :2], keep[0, 0], keep[:2, 2:], keep[2:, :2] = 1, -3, -1, 0.2
    drop[2:, :2] = 0.1
    return torch.stack([keep, drop], -1)[None]


def test_the_example_of_the_sheet() -> None:
    """Logits are averaged: averaged probabilities would keep the first window. Ties drop."""
    means = window_means(scores(), 2)
    torch.testing.assert_close(means, torch.tensor([[0.0, 0], [-1, 0], [0.2, 0.1], [0, 0]]))
    torch.testing.assert_close(
        means.softmax(-1)[:, 0], torch.tensor([0.5, 0.2689, 0.525, 0.5]), atol=1e-4, rtol=0
    )
    assert decide(scores(), 2).tolist() == [0, 0, 1, 0]


def test_the_pruning_loss_of_the_sheet() -> None:
    mask = torch.zeros(1, 4, 4, dtype=torch.bool)
    mask[0, 0, 0] = True
    assert pruning_loss(scores(), mask).item() == pytest.approx(0.87447, abs=1e-5)
    finer = mask.repeat_interleave(4, 1).repeat_interleave(4, 2)
    assert pruning_loss(scores(), finer).item() == pytest.approx(0.87447, abs=1e-5)


def test_drawn_decisions_are_0_or_1_have_gradients_and_follow_the_probability() -> None:
    logits = torch.tensor([math.log(0.8), math.log(0.2)]).expand(4000, 2, 2, 2).clone().requires_grad_()
    torch.manual_seed(0)
    drawn = decide(logits, 2, draw=True)
    assert set(drawn.tolist()) == {0.0, 1.0}
    assert drawn.mean().item() == pytest.approx(0.8, abs=0.02)
    drawn.sum().backward()
    assert (logits.grad[..., 0] > 0).all() and (logits.grad[..., 1] < 0).all()


def test_similarity_and_reconstruction_by_hand() -> None:
    """Flat pictures of .2 and .4: (2 * .08 + c1) / (.04 + .16 + c1), c1 = 1e-4; spectra differ by .2 * 256 in one of 16 x 9 complex numbers."""
    a, b = torch.full((1, 1, 16, 16), 0.2), torch.full((1, 1, 16, 16), 0.4)
    alike = (0.16 + 1e-4) / (0.2 + 1e-4)
    assert similarity(a, b).item() == pytest.approx(alike, abs=2e-5)
    assert similarity(a, a).item() == pytest.approx(1)
    assert reconstruction(a, b).item() == pytest.approx(0.2 + 1 - alike + 0.1 * 51.2 / (16 * 9 * 2), abs=2e-5)


def net(**settings):
    torch.manual_seed(0)
    return balanced(WindowedUNet(8, (2, 3, 2), (1, 2, 2), side=4, **settings), picture()).eval()


def picture(count=3, height=16, width=24):
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def test_a_window_that_is_dropped_leaves_the_stage_bit_for_bit_and_policies_follow_parity() -> None:
    """Stage by stage: places of no active window, shifted or not, come out as they went in; block 2 works where block 0 did."""
    model, x = net(), picture()
    stage = model.stages[1]
    seen = []
    with secateur.attach(model, "lmd-vit") as attached:
        inner = stage.forward

        def watched(states):
            out = inner(states)
            seen.append((states, out))
            return out

        stage.forward = watched
        model(x)
        stage.forward = inner
    even, odd = attached.active[2:4]
    states, out = seen[0]
    untouched = ~(even | odd)
    assert untouched.any() and even.any() and odd.any() and not torch.equal(even, odd)
    assert torch.equal(out[untouched], states[untouched])
    assert (out[even] != states[even]).any(-1).all()


@torch.no_grad()
def test_all_windows_are_the_dense_network_and_none_the_input_of_a_stage() -> None:
    model, x = net(), picture()
    dense = model(x)
    with secateur.attach(model, "lmd-vit", threshold=0.0) as attached:
        assert torch.equal(model(x), dense) and attached.work.share.tolist() == [1, 1, 1]
    for stage in model.stages:
        for predictor in stage.predictors:
            predictor.score[-1].weight.data.zero_()
            predictor.score[-1].bias.data.copy_(torch.tensor([-9.0, 9.0]))
    states = torch.randn(2, 8, 8, 8)
    with secateur.attach(model, "lmd-vit"):
        assert torch.equal(model.stages[0](states), states)
    for stage in model.stages:
        for predictor in stage.predictors:
            predictor.score[-1].bias.data.copy_(torch.tensor([9.0, -9.0]))
    with secateur.attach(model, "lmd-vit"):
        torch.testing.assert_close(model(x), dense, rtol=1e-6, atol=1e-6)
    assert torch.equal(model(x), dense)


@torch.no_grad()
def test_stages_that_are_not_named_are_dense() -> None:
    model, x = net(), picture()
    with secateur.attach(model, "lmd-vit", stages=(1,)) as attached:
        model(x)
        assert len(attached.active) == 2 and attached.active[0].shape == (3, 8, 12)
        share = attached.work.mean
    with secateur.attach(model, "lmd-vit") as attached:
        model(x)
        assert attached.work.mean < share < 1


def test_work_follows_the_active_windows_as_the_counter_sees_it() -> None:
    """What is said to be saved is what the whole forward saves, the predictors paid for."""
    model, x = net(), picture(1)
    dense = macs(model, x)
    with secateur.attach(model, "lmd-vit") as attached:
        now = macs(model, x)
        saved = int(attached.work.whole[0] - attached.work.done[0])
        share = torch.stack([active.float().mean() for active in attached.active]).mean()
    assert 0 < share < 1
    assert dense - now == saved


def test_training_finds_the_corner_that_is_blurred() -> None:
    """At the bottom, where a place sees enough, exactly its windows are kept, and the network comes nearer to the sharp picture."""
    task = dataclasses.replace(LmdVit.example(), build=lambda: WindowedUNet(8, (2, 1, 2), (1, 2, 2), side=4))
    pruned = secateur.train_prune(task, method="lmd-vit", steps=60, weight=1.0, lr=5e-3)
    model = pruned.model.eval()
    with torch.no_grad(), secateur.attach(model, "lmd-vit") as attached:
        made = model(task.train[0])
    deep = attached.active[2]  # [8, 8, 8]: half of the resolution
    assert deep[:, :4, :4].float().mean() > 0.9 and deep[:, 4:, 4:].float().mean() < 0.1
    assert F.mse_loss(made, task.train[1]) < F.mse_loss(task.train[0], task.train[1])


def test_the_mask_is_padded_as_the_pictures_are(monkeypatch) -> None:
    """20 x 20 pixels lie in the middle of 24 x 24: a mask of its own size would be stretched over a map of 24 and of 12."""
    task, seen = LmdVit.example(), []
    blurred, sharp = (F.interpolate(part, (20, 20)) for part in task.train[:2])
    mask = torch.zeros(8, 20, 20, dtype=torch.bool)
    mask[:, :8, :8] = True
    monkeypatch.setattr(lmd_vit, "pruning_loss", lambda scores, m: seen.append(m) or pruning_loss(scores, m))
    task = dataclasses.replace(task, train=(blurred, sharp, mask), inputs=blurred[:1])
    secateur.train_prune(task, method="lmd-vit", steps=1)
    assert seen and all(torch.equal(m, F.pad(mask[:4].float(), (2, 2, 2, 2), mode="replicate")) for m in seen)


def test_pictures_of_any_size_are_padded_around_and_cut_again() -> None:
    model = net()
    assert model(picture(1, 13, 30)).shape == (1, 3, 13, 30)


def test_an_untrained_network_gives_its_input_and_learns_at_once_what_to_add() -> None:
    """The weights of what is added have gradients, though all are zero."""
    model, x = WindowedUNet(8, (1, 1, 1), (1, 1, 1), side=4), picture(1)
    assert torch.equal(model(x), x)
    reconstruction(model(x), x * 0.5).backward()
    assert (model.write.weight.grad[:3].flatten(1).abs().sum(1) > 0).all()


def test_the_output_gate_never_closes() -> None:
    """With g at minus infinity a tenth of y is added."""
    model, x = net(), picture(1)
    with torch.no_grad():
        model.write.weight[3].zero_()
        model.write.bias[3] = 50.0
        fully = model(x) - x
        model.write.bias[3] = -50.0
        torch.testing.assert_close(model(x) - x, 0.1 * fully, rtol=1e-5, atol=1e-6)


def test_half_precision_averages_in_single() -> None:
    assert Predictor(8).half()(torch.zeros(1, 2, 2, 8).half()).dtype == torch.float16
    assert window_means(torch.zeros(1, 2, 2, 2).half(), 2).dtype == torch.float32


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(SecateurError, match="no stages of windows"):
        secateur.attach(torch.nn.Linear(2, 2), "lmd-vit")
    with pytest.raises(SecateurError, match="there is no stage 3.*0 to 2"):
        secateur.attach(net(), "lmd-vit", stages=(3,))
    with pytest.raises(SecateurError, match="threshold"):
        LmdVit(threshold=1.0)
    with pytest.raises(SecateurError, match="make no U"):
        WindowedUNet(8, (1, 1), (1, 1))
    with pytest.raises(SecateurError, match="windows of 4 x 4 don't divide a map of 6 x 8"):
        Stage(8, 1, 1, 4, False)(torch.zeros(1, 6, 8, 8))
    x = picture()
    for data in ((x, x), (x, x, torch.zeros(3, 8, 8)), (x, x[:, :, :8], torch.zeros(3, 16, 24))):
        with pytest.raises(SecateurError, match="of one size"):
            check_masks(Task("x", net, data))
