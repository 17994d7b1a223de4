"""The selective scan against one step at a time, and what it does at the places of tokens that have left."""

import math

import pytest
import torch
from torch import nn

from secateur import SecateurError
from secateur.families.scan import LinearScan, Path, selective_scan
from secateur.families.vim import Direction, Vim


def one_by_one(decay, x):
    h, found = torch.zeros_like(x[:, 0]), []
    for t in range(x.shape[1]):
        h = decay[:, t] * h + x[:, t]
        found.append(h)
    return torch.stack(found, 1)


@pytest.mark.parametrize("length", [1, 2, 17, 33, 197, 500])
def test_the_scan_and_its_gradients_are_those_of_single_steps_in_double(length) -> None:
    g = torch.Generator().manual_seed(length)
    # from hardly any decay to one that is 0 in float32
    decay = torch.exp(-torch.rand(2, length, 5, generator=g) * torch.tensor([1e-4, 0.1, 1.0, 20.0, 200.0]))
    x, weight = torch.randn(2, 2, length, 5, generator=g)
    given = [t.clone().requires_grad_() for t in (decay, x)]
    exact = [t.double().requires_grad_() for t in (decay, x)]
    made, wanted = LinearScan.apply(*given), one_by_one(*exact)
    torch.testing.assert_close(made.double(), wanted, rtol=1e-5, atol=1e-5)
    (made * weight).sum().backward()
    (wanted * weight).sum().backward()
    for a, b in zip(given, exact):
        # of sums over hundreds of steps that hardly decay: to their size
        torch.testing.assert_close(a.grad.double(), b.grad, rtol=1e-5, atol=1e-5 * max(1, b.grad.abs().max()))


def test_the_scan_has_second_derivatives() -> None:
    g = torch.Generator().manual_seed(0)
    decay = torch.rand(1, 7, 2, generator=g, dtype=torch.double).requires_grad_()
    x = torch.randn(1, 7, 2, generator=g, dtype=torch.double).requires_grad_()
    assert torch.autograd.gradgradcheck(LinearScan.apply, (decay, x))


DECAY, X = torch.tensor([0.9, 0.8, 0.5, 0.6, 0.7]), torch.tensor([1.0, 2.0, -1.5, 0.5, 3.0])
KEPT = torch.tensor([[0, 3, 4]])


def path(gap, **more):
    return Path(KEPT, 5, torch.tensor([3]), gap=gap, **more)


@pytest.mark.parametrize(
    "gap, wanted",
    [
        ("identity", [1, 1.1, 3.77]),
        ("cached", [1, 0.74, 3.518]),
        ("repeat", [1, 0.716, 3.5012]),
        # every empty place decays by half: .25 * .6 = .15
        ("bias", [1, 0.65, 3.455]),
    ],
)
@pytest.mark.parametrize("masked", [False, True])
def test_the_worked_example_of_the_gaps(gap, wanted, masked) -> None:
    delta = -DECAY.log()[None, :, None]
    rest = torch.tensor([math.log(2)])
    if masked:
        alive = torch.zeros(1, 5, dtype=torch.bool).scatter(1, KEPT, True)
        way = Path(torch.arange(5)[None], 5, torch.tensor([3]), alive, gap, deltas={"forth": delta})
        travel, x = way.travel(delta, rest, "forth"), X[None, :, None] * alive[..., None]
        h = LinearScan.apply(torch.exp(-travel), x).gather(1, KEPT[..., None])
    else:
        way = path(gap, deltas={"forth": delta})
        travel = way.travel(delta[:, KEPT[0]], rest, "forth")
        h = LinearScan.apply(torch.exp(-travel), X[KEPT[0]][None, :, None])
    torch.testing.assert_close(h.flatten(), torch.tensor(wanted))


def test_the_dense_example_and_the_full_scan_with_empty_inputs() -> None:
    h = LinearScan.apply(DECAY[None, :, None], X[None, :, None])
    torch.testing.assert_close(h.flatten(), torch.tensor([1, 2.8, -0.1, 0.44, 3.308]))
    h = LinearScan.apply(DECAY[None, :, None], (X * torch.tensor([1.0, 0, 0, 1, 1]))[None, :, None])
    torch.testing.assert_close(h.flatten(), torch.tensor([1, 0.8, 0.4, 0.74, 3.518]))


def test_the_way_back_reads_the_gaps_from_the_other_end() -> None:
    way = path("repeat").reversed()
    assert way.positions.tolist() == [[0, 1, 4]]
    travel = way.travel(torch.ones(1, 3, 1), torch.ones(1), "back")
    assert travel.flatten().tolist() == [1, 1, 3]


def test_the_selective_scan_is_its_definition() -> None:
    g = torch.Generator().manual_seed(1)
    x, delta = torch.randn(2, 9, 3, generator=g), torch.rand(2, 9, 3, generator=g)
    a, d = -torch.rand(3, 4, generator=g), torch.randn(3, generator=g)
    b, c = torch.randn(2, 2, 9, 4, generator=g)
    h, wanted = torch.zeros(2, 3, 4), []
    for t in range(9):
        h = torch.exp(delta[:, t, :, None] * a) * h + delta[:, t, :, None] * b[:, t, None] * x[:, t, :, None]
        wanted.append((h * c[:, t, None]).sum(-1) + d * x[:, t])
    torch.testing.assert_close(selective_scan(x, delta, a, b, c, d), torch.stack(wanted, 1))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_delta_that_is_no_number_is_refused(bad) -> None:
    net = Vim(image=8, patch=2, channels=1, width=16, depth=2, state=4)
    with torch.no_grad():
        net.blocks[1].back.delta.bias[3] = bad
    with pytest.raises(SecateurError, match="Delta holds NaN"):
        net(torch.zeros(1, 1, 8, 8))


@pytest.mark.parametrize("conv", ["condensed", "zeros"])
def test_the_convolution_sees_zeros_or_nothing_at_empty_places(conv) -> None:
    way = Direction(1, 2, 1, kernel=2)
    with torch.no_grad():
        way.conv.weight.copy_(torch.tensor([[[10.0, 1.0]]]))
        way.conv.bias.zero_()
    made = way.convolve(torch.tensor([[[1.0], [2.0], [3.0]]]), path("repeat", conv=conv))
    # the token at 3 stands behind an empty place, the one at 4 behind that at 3
    assert made.flatten().tolist() == ([1, 12, 23] if conv == "condensed" else [1, 2, 23])


def test_a_number_of_tokens_without_a_middle_is_refused() -> None:
    with pytest.raises(SecateurError, match="10 tokens have no middle"):
        Vim(image=6, patch=2, channels=1, width=16, depth=1)


@torch.no_grad()
@pytest.mark.parametrize("masked", [False, True])
def test_the_cls_token_stands_in_the_middle_and_the_others_keep_their_order(masked) -> None:
    # 6 patches around a CLS token at place 3; patches 0, 1, 2 and 5 stay
    x = torch.arange(7.0)[None, :, None]
    stays = torch.tensor([[1, 1, 1, 1, 0, 0, 1]]).bool()
    way = Path(torch.arange(7)[None], 7, torch.tensor([3]))
    made, new = way.leave(x, stays, masked=masked)
    if masked:
        assert new.alive.tolist() == [[True, True, True, True, False, False, True]]
        assert made.flatten().tolist() == [0, 1, 3, 2, 4, 5, 6]
    else:
        assert new.positions.tolist() == [[0, 1, 2, 3, 6]]
        assert made.flatten().tolist() == [0, 1, 3, 2, 6]
    assert new.cls.tolist() == [2]
    made, new = way.leave(x, stays, middle=False, masked=masked)
    assert new.cls.tolist() == [3] and made.flatten().tolist()[:4] == [0, 1, 2, 3]


def test_rms_norms_and_scans_follow_the_dtype() -> None:
    net = Vim(image=8, patch=2, channels=1, width=16, depth=2, state=4).to(torch.bfloat16)
    assert net(torch.zeros(1, 1, 8, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert all(isinstance(n, nn.RMSNorm) for n in net.norms)
