"""What leaves a two-way Mamba, and that the scan goes on past its place; numbers of the sheet, or by hand."""

import dataclasses
import inspect
from itertools import product

import pytest
import torch

import secateur
from secateur import SecateurError
from secateur.families.vim import Vim
from secateur.method import method_class
from secateur.methods.top_vim import TopVim, importance, odd_count
from secateur.tasks import cifar10, digits
from secateur.training.skip import SkipMethod


def test_the_worked_scores() -> None:
    y = torch.tensor([[0.5, -1, 2], [-0.2, -0.3, -0.1], [1, 1, -3], [0.1, 0, 0.2], [-1, 0.6, 0.3]])[None]
    for score, wanted in (
        ("clipped", [2.5, 0, 2, 0.3, 0.9]),
        ("unclipped", [1.5, -0.6, -1, 0.3, -0.1]),
        ("l1", [3.5, 0.6, 5, 0.3, 1.9]),
    ):
        torch.testing.assert_close(importance(y, score)[0], torch.tensor(wanted))


@pytest.mark.parametrize("r, wanted", [(0.8, [197, 157, 125, 101]), (0.7, [197, 139, 97]), (1.0, [197, 197])])
def test_the_worked_counts(r, wanted) -> None:
    counts = [197]
    while len(counts) < len(wanted):
        counts.append(odd_count(counts[-1] - 1, r))
    assert counts == wanted


def test_a_count_is_odd_and_never_more_than_there_are() -> None:
    for patches, percent in product(range(2, 40, 2), range(1, 101)):
        count = odd_count(patches, percent / 100)
        assert count % 2 == 1 and count <= patches + 1
    assert odd_count(10, 0.3) == 3  # 10 x .3 is 3.0000000000000004 in binary


@pytest.mark.parametrize("depth, wanted", [(24, [5, 10, 15]), (4, [1, 2, 3]), (2, [1])])
def test_the_papers_steps_at_any_depth(depth, wanted) -> None:
    assert list(TopVim().steps(depth)) == wanted


def net(**more):
    torch.manual_seed(0)
    own = {"image": 8, "patch": 2, "channels": 1, "width": 16, "depth": 4, "state": 4}
    model = Vim(**{**own, **more}).eval()
    with torch.no_grad():  # deltas that make a state forget within a few steps
        for block in model.blocks:
            for way in (block.forth, block.back):
                way.delta.bias.add_(3)
    return model


PICTURES = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(1))
GAPS = ("repeat", "cached", "bias", "identity")


@torch.no_grad()
@pytest.mark.parametrize("gap", GAPS)
@pytest.mark.parametrize("conv", ["condensed", "zeros"])
@pytest.mark.parametrize("cls", ["middle", "place"])
def test_masked_is_gathered_for_every_rule(gap, conv, cls) -> None:
    model, how = net(), {"gap": gap, "conv": conv, "cls": cls, "r": 0.6}
    with secateur.attach(model, "top-vim", **how) as attached:
        made = model(PICTURES)
        share = attached.work.share.tolist()
    with secateur.attach(model, "top-vim", **how, masked=True):
        torch.testing.assert_close(model(PICTURES), made, rtol=1e-5, atol=1e-5)
    assert (model(PICTURES) - made).abs().max() > 1e-4
    # 17 tokens, then 16 x .6 -> 11, 10 x .6 -> 7, 6 x .6 -> 5
    assert share == [pytest.approx((17 + 11 + 7 + 5) / 68)] * 3


@torch.no_grad()
def test_every_rule_gives_something_else() -> None:
    model, made = net(), {}
    for gap, conv, score in product(GAPS, ("condensed", "zeros"), ("clipped", "unclipped", "l1", "random")):
        with secateur.attach(model, "top-vim", gap=gap, conv=conv, score=score, r=0.6):
            made[gap, conv, score] = model(PICTURES)
    names = list(made)
    for number, first in enumerate(names):
        for second in names[:number]:
            assert not torch.allclose(made[first], made[second], rtol=0, atol=1e-7), (first, second)


@torch.no_grad()
def test_cached_is_the_whole_scan_with_empty_inputs() -> None:
    """Patches that left are blanked in a network that computes everything: what enters the scans is zero, Delta as it was."""
    model, seen = net(depth=2), {}
    with secateur.attach(model, "top-vim", gap="cached", conv="zeros", cls="place", r=0.5) as attached:
        inner = model.skip
        model.skip = lambda n, t: seen.setdefault(n, inner(n, t))
        made = model(PICTURES)
    positions = seen[1].path.positions
    there = torch.zeros(3, 17, dtype=torch.bool).scatter(1, positions, True)
    first, second = model.blocks
    x = model.start(PICTURES)
    added, _ = first(model.norms[0](x), _way(3))
    x = x + added
    wide, gate = second.into(model.norms[1](x)).chunk(2, -1)
    old, _ = first.into(model.norms[0](model.start(PICTURES))).chunk(2, -1)
    total = 0
    for now, before, flip in ((second.forth, first.forth, False), (second.back, first.back, True)):
        turn = (lambda t: t.flip(1)) if flip else (lambda t: t)
        alive = turn(there)[..., None]
        u = torch.nn.functional.silu(now.conv((turn(wide) * alive).transpose(1, 2))[..., :17].transpose(1, 2))
        delta = torch.where(alive, _delta(now, u), _delta(before, _conved(before, turn(old))))
        b, c = now.read(u).split([now.rank, 4, 4], -1)[1:]
        h, out = torch.zeros(3, 32, 4), []
        for t in range(17):
            h = torch.exp(-delta[:, t, :, None] * now.log_a.exp()) * h
            h = h + (delta[:, t] * u[:, t] * alive[:, t])[..., None] * b[:, t, None]
            out.append((h * c[:, t, None]).sum(-1) + now.d * u[:, t])
        total = total + turn(torch.stack(out, 1))
    x = x + second.out(total * torch.nn.functional.silu(gate))
    torch.testing.assert_close(model.head(model.norm(x[:, 8])), made, rtol=1e-5, atol=1e-5)
    assert attached.work.share.max() < 1


def _way(count):
    from secateur.families.scan import Path

    return Path(torch.arange(17).expand(count, -1), 17, torch.full((count,), 8))


def _conved(way, x):
    return torch.nn.functional.silu(way.conv(x.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2))


def _delta(way, u):
    return torch.nn.functional.softplus(way.delta(way.read(u)[..., : way.rank]))


@torch.no_grad()
@pytest.mark.parametrize("masked", [False, True])
def test_the_cls_token_stays_and_stands_in_the_middle(masked) -> None:
    model, seen = net(), {}
    with secateur.attach(model, "top-vim", r=0.6, cls="middle", masked=masked):
        inner = model.skip
        model.skip = lambda n, t: seen.setdefault(n, inner(n, t))
        model(PICTURES)
    for number, half in ((1, 5), (2, 3), (3, 2)):
        path = seen[number].path
        for row in range(3):
            places = path.positions[row] if not masked else path.positions[row][path.alive[row]]
            assert places.tolist() == sorted(places.tolist()) and len(places) == 2 * half + 1
            assert places[half] == path.cls[row]


def test_gradients_of_the_masked_pass_are_those_of_the_gathered_one() -> None:
    model, found = net(), []
    for masked in (False, True):
        with secateur.attach(model, "top-vim", masked=masked, gap="cached"):
            model.zero_grad()
            model(PICTURES).square().sum().backward()
        found.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "settings, told",
    [
        ({"r": 0.0}, "out of range"),
        ({"r": 1.2}, "out of range"),
        ({"r": float("nan")}, "out of range"),
        ({"start": 4}, "no patch would leave: there are 4 blocks"),
        ({"gap": "interpolate"}, "gap"),
        ({"conv": "holes"}, "conv"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(settings, told) -> None:
    with pytest.raises(SecateurError, match=told):
        secateur.attach(net(), "top-vim", **settings)


@torch.no_grad()
def test_scores_that_are_no_numbers_are_refused() -> None:
    model = net()
    model.blocks[0].into.weight[40] = float("nan")  # the gate
    with secateur.attach(model, "top-vim"), pytest.raises(SecateurError, match="NaN"):
        model(PICTURES)


def test_an_untrained_network_is_trained_and_then_tuned_with_it_on() -> None:
    task = TopVim.example()
    task.quality = lambda model: float(model.skip is not None)
    pruned = secateur.train_prune(task, method="top-vim", steps=2, batch=8)
    found = {row["phase"]: row["quality"] for row in pruned.report["phases"]}
    assert found == {"dense": 0.0, "pruned, not tuned": 1.0, "tuning": 1.0}
    # 17 tokens, then 16 x .8 -> 13, 12 x .8 -> 11, 10 x .8 -> 9
    assert pruned.report["phases"][-1]["work"] == pytest.approx((17 + 13 + 11 + 9) / 68)
    assert pruned.model.skip is None and pruned.model.path is None


def test_the_networks_of_the_tasks_take_their_pictures() -> None:
    for name in ("digits-vim", "digits-dependency-vit", "cifar-vim", "cifar-dependency-vit"):
        build = {**digits.BUILDS, **cifar10.OWN}[name]
        model = build()
        method = "top-vim" if name.endswith("vim") else "dependency-vit"
        with secateur.attach(model, method) as attached, torch.no_grad():
            assert model(torch.zeros(2, *model.input_size)).shape == (2, 10)
            assert attached.work.share.max() < 0.9


@torch.no_grad()
def test_the_cls_token_keeps_its_place_unless_it_must_stand_in_the_middle() -> None:
    model, seen = net(), {}
    with secateur.attach(model, "top-vim", r=0.6):
        inner = model.skip
        model.skip = lambda n, t: seen.setdefault(n, inner(n, t))
        model(PICTURES)
    for tokens in seen.values():
        assert tokens.path.cls.tolist() == [8, 8, 8] and (tokens.path.positions == 8).any(1).all()


@pytest.mark.parametrize(
    "method", [m for m in secateur.list_methods() if issubclass(method_class(m), SkipMethod)]
)
def test_no_setting_has_the_name_of_an_argument_that_would_take_it(method) -> None:
    own = {field.name for field in dataclasses.fields(method_class(method))}
    taken = {
        *inspect.signature(secateur.attach).parameters,
        *inspect.signature(secateur.train_prune).parameters,
    }
    assert not own & (taken - {"settings", "hyperparameters"})


@torch.no_grad()
def test_chance_differs_by_picture_and_by_draw() -> None:
    model, made = net(), []
    same = PICTURES[:1].expand(3, -1, -1, -1)
    for draw in (0, 0, 1):
        with secateur.attach(model, "top-vim", score="random", draw=draw):
            made.append(model(same))
    assert torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2])
    assert not torch.equal(made[0][0], made[0][1])
