"""PSOD: matching and losses by the worked example, experts by task, and what is kept at the end."""

import itertools

import pytest
import torch
from torch import nn

from secateur.method import make_method
from secateur.methods.psod import Head, Psod
from secateur.saliency.objects.method import Lesson
from secateur.saliency.objects.opinions import match, pair_losses, tries, unlike, worth
from secateur.tasks.sod import learn, lessons, read


def test_the_worked_example_of_losses_and_matching() -> None:
    said = torch.tensor([[0.9, 0.8, 0.1], [0.2, 0.3, 0.7]], dtype=torch.float64).logit()
    entropy, dice = pair_losses(said, torch.tensor([[1, 1, 0], [0, 0, 1]]).bool())
    assert entropy.flatten().tolist() == pytest.approx([0.144622, 2.071536, 1.339128, 0.312164], abs=1e-6)
    assert dice.flatten().tolist() == pytest.approx([0.105263, 0.928571, 0.6875, 0.363636], abs=1e-6)
    assert [t.tolist() for t in match(entropy + dice)] == [[0, 1], [0, 1]]


def test_matching_of_the_example_of_overlaps() -> None:
    rows, columns = match(-torch.tensor([[0.75, 0], [0.8, 0], [0, 0.6]]))
    assert rows.tolist() == [1, 2] and columns.tolist() == [0, 1]


def test_more_truths_than_prompts_take_the_cheapest() -> None:
    cost = torch.rand(2, 4, generator=torch.Generator().manual_seed(0))
    rows, columns = match(cost)
    best = min(cost[0, a].item() + cost[1, b].item() for a, b in itertools.permutations(range(4), 2))
    assert cost[rows, columns].sum().item() == pytest.approx(best)


def test_masks_said_twice_are_dropped_in_the_order_of_liking() -> None:
    masks = torch.zeros(4, 1, 20, dtype=torch.bool)
    masks[0, 0, :19], masks[1, 0, :], masks[2, 0, 10:], masks[3] = True, True, True, False
    assert unlike(masks, [1, 0, 2, 3]) == [1, 2, 3]  # 19 of 20 is above 0.9
    assert unlike(masks, [0, 1, 2]) == [0, 2]
    assert unlike(masks[:, :, :0], [3, 2]) == [3]  # two of nothing are the same


def head(prompts: int = 3) -> Head:
    torch.manual_seed(0)
    return Psod(prompts=prompts, width=8, depth=1).head((3, 5))  # type: ignore[return-value]


def levels(net: Head) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return net.pyramid(
        [torch.randn(2, 3, 16, 16, generator=generator), torch.randn(2, 5, 8, 8, generator=generator)]
    )


def test_each_task_runs_its_own_experts_only() -> None:
    net = head()
    seen = levels(net)
    masks = torch.rand(2, 2, 16, 16) > 0.5
    drawn, liked = net.masks(seen)[0], net.scores(seen, masks)
    with torch.no_grad():
        for block in net.blocks:
            block.experts["scores"][1].weight.mul_(-2.0)
    assert torch.equal(net.masks(seen)[0], drawn) and not torch.allclose(net.scores(seen, masks), liked)
    liked = net.scores(seen, masks)
    with torch.no_grad():
        for block in net.blocks:
            block.experts["masks"][1].weight.mul_(-2.0)
    assert torch.equal(net.scores(seen, masks), liked) and not torch.allclose(net.masks(seen)[0], drawn)


def test_a_score_is_of_its_mask_alone() -> None:
    net = head()
    seen, masks = levels(net), torch.rand(2, 4, 16, 16, generator=torch.Generator().manual_seed(2)) > 0.5
    order = torch.tensor([2, 0, 3, 1])
    assert torch.allclose(net.scores(seen, masks[:, order]), net.scores(seen, masks)[:, order], atol=1e-5)
    assert torch.allclose(net.scores(seen, masks[:, :1]), net.scores(seen, masks)[:, :1], atol=1e-5)


class Told(Head):
    """A head whose masks are given, and whose scores are the share of a mask."""

    def __init__(self, drawn: torch.Tensor, there: torch.Tensor) -> None:
        nn.Module.__init__(self)
        self.drawn, self.there = drawn, there

    def pyramid(self, maps: object) -> list:  # type: ignore[override]
        return []

    def masks(self, levels: object) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        return self.drawn, self.there

    def scores(self, levels: object, masks: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return masks.float().mean((2, 3)).logit()


def test_what_is_there_is_kept_best_liked_first() -> None:
    drawn = torch.full((1, 3, 1, 10), -5.0)
    drawn[0, 0, 0, :3] = drawn[0, 1, 0, 3:8] = drawn[0, 2, 0, :9] = 5.0
    found = Psod().read(Told(drawn, torch.tensor([[1.0, 1.0, -1.0]])), [])  # the last isn't there
    assert found.masks[0].sum((1, 2)).tolist() == [5, 3, 0]
    assert found.scores[0].tolist() == pytest.approx([0.5, 0.3, 0])
    assert torch.equal(found.saliency[0] > 0.5, found.masks[0, 0])
    lone = Psod().read(Told(drawn, torch.tensor([[-3.0, -2.0, -1.0]])), [])
    assert lone.masks[0].sum((1, 2)).tolist() == [9, 0, 0]  # the likeliest, as none is there


def test_the_loss_by_hand_and_in_any_order_of_truths() -> None:
    drawn = torch.tensor([[0.9, 0.8, 0.1], [0.2, 0.3, 0.7]]).logit()[None, :, None]
    truths = torch.tensor([[1, 1, 0], [0, 0, 1]]).bool()[None, :, None]
    told = Told(drawn, torch.zeros(1, 2))
    method = Psod(prompts=2, preference=0)
    own = method.loss(told, Lesson([], truths, torch.tensor([2]))).item()
    assert own == pytest.approx((0.144622 + 0.105263 + 0.312164 + 0.363636) / 2 + 0.693147, abs=1e-5)
    assert method.loss(told, Lesson([], truths.flip(1), torch.tensor([2]))).item() == pytest.approx(own)
    alone = torch.cat([truths[:, :1], truths[:, :1] & False], 1)
    one = method.loss(told, Lesson([], alone, torch.tensor([1]))).item()
    assert one == pytest.approx(0.144622 + 0.105263 + 0.693147, abs=1e-5)  # the empty place is no truth


def test_tried_masks_are_of_all_worths_and_worth_is_overlap() -> None:
    torch.manual_seed(0)
    truths = torch.zeros(3, 2, 20, 20, dtype=torch.bool)
    truths[:, 0, 4:12, 4:12] = True
    truths[0, 1, 14:, 14:] = True
    count = torch.tensor([2, 1, 1])
    masks, value = tries(truths, count, truths[:, :1])
    assert masks.shape == (3, 7, 20, 20) and torch.equal(value, worth(masks, truths))
    assert (value[:, 0] == 1).all() and (value[:, 6] == 1).all() and (value[1:, 1:5] < 1).all()
    for n, k in ((0, 1), (1, 2), (2, 3)):
        best = max(
            int((masks[n, k] & t).sum()) / max(int((masks[n, k] | t).sum()), 1) for t in truths[n] if t.any()
        )
        assert value[n, k].item() == pytest.approx(best)


def test_three_prompts_find_more_of_several_objects_than_one() -> None:
    """Two squares of different colours in every picture."""
    generator = torch.Generator().manual_seed(0)
    masks = torch.zeros(32, 2, 16, 16, dtype=torch.bool)
    for mask in masks:
        for k, one in enumerate(mask):
            top, left = int(torch.randint(0, 9, (1,), generator=generator)), 8 * k
            one[top : top + 7, left : left + 7] = True
    light = torch.cat([masks.float(), torch.zeros(32, 1, 16, 16)], 1)
    maps = [light + 0.1 * torch.randn(light.shape, generator=generator)]
    maps.append(torch.nn.functional.avg_pool2d(maps[0], 2))
    met = {}
    for prompts in (3, 1):
        method = make_method("psod", prompts=prompts, width=16, depth=1)
        net = learn(method, lessons([m[:24] for m in maps], masks[:24]), steps=50, lr=1e-2)
        found = read(method, net, [m[24:] for m in maps])
        met[prompts] = (worth(masks[24:], found.masks) > 0.5).float().mean().item()
    assert met[3] > met[1] + 0.2 and met[1] > 0.3
