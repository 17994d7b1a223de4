"""ConnNet: its losses by hand, the non-local block, and that what it learned is links."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from secateur import SecateurError
from secateur.method import make_method
from secateur.methods.connnet import ConnNet, bicon
from secateur.saliency.objects.connectivity import encode
from secateur.saliency.objects.features import Pyramid, Relations, feature_maps
from secateur.saliency.objects.method import Lesson
from secateur.tasks.sod import learn, lessons, read


class Said(nn.Module):
    """A head that says what it is told to."""

    def __init__(self, *logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = [nn.Parameter(one) for one in logits]

    def forward(self, maps: object) -> list[torch.Tensor]:
        return list(self.logits)


MASK = torch.tensor([[0, 1, 1], [0, 1, 0], [0, 0, 0]]).bool()


def test_the_worked_example_as_what_a_head_says() -> None:
    said = torch.where(encode(MASK), 0.9, 0.1)
    said[4, 0, 1] = 0.4
    found = ConnNet().read(Said(said.logit()[None]), [])
    assert torch.equal(found.masks[0, 0], MASK) and int(found.instances.max()) == 1
    assert found.saliency[0][MASK].tolist() == pytest.approx([0.81] * 3)
    assert found.saliency[0][~MASK].tolist() == pytest.approx([0.01] * 6)
    mean = ConnNet(vote="mean").read(Said(said.logit()[None]), []).saliency[0]
    assert mean[0, 1].item() == pytest.approx((0.4 + 0.9 + 6 * 0.1) / 8)


def test_cross_entropy_counts_the_border_and_sums_over_sizes() -> None:
    """All logits 0: each size costs log 2, whatever the truth."""
    lesson = Lesson([], MASK[None, None], torch.tensor([1]))
    zeros = Said(torch.zeros(1, 8, 3, 3), torch.zeros(1, 8, 1, 1))
    assert ConnNet().loss(zeros, lesson).item() == pytest.approx(2 * math.log(2))
    sure = Said(torch.where(encode(MASK), 30.0, -30.0)[None])
    assert ConnNet().loss(sure, lesson).item() == pytest.approx(0, abs=1e-6)
    one = torch.where(encode(MASK), 30.0, -30.0)
    one[0, 0, 0] = 30.0  # a link out of the picture
    assert ConnNet().loss(Said(one[None]), lesson).item() == pytest.approx(30 / 72, rel=1e-4)


def test_touching_objects_are_parted_where_the_truth_numbers_them() -> None:
    both = torch.zeros(1, 2, 2, 4, dtype=torch.bool)
    both[0, 0, :, :2] = both[0, 1, :, 2:] = True
    parted = Said(torch.where(encode(torch.tensor([[1, 1, 2, 2]] * 2)), 30.0, -30.0)[None])
    assert ConnNet().loss(parted, Lesson([], both, torch.tensor([2]))).item() < 1e-6
    assert int(ConnNet().read(parted, []).instances.max()) == 2


def test_the_loss_of_biconnet_by_hand() -> None:
    """Of two pixels beside each other, one link said 0.8 by one and 0.5 by the other, all else 0."""
    mask = torch.ones(1, 1, 2).bool()
    logits = torch.full((1, 8, 1, 2), -40.0)
    logits[0, 4, 0, 0], logits[0, 3, 0, 1] = torch.tensor([0.8, 0.5]).logit()
    own = -(math.log(0.8) + math.log(0.5)) / 16
    mutual = -2 * math.log(0.4) / 16
    strongest = -math.log(0.4)
    expected = (
        0.8 * own + 0.2 * mutual + 0 + strongest
    )  # both pixels are edges, and their weakest mutual link is 0
    assert bicon(logits, encode(mask), mask).item() == pytest.approx(expected, rel=1e-4)


def test_relations_are_a_softmax_over_all_places() -> None:
    torch.manual_seed(0)
    block, x = Relations(4), torch.randn(1, 4, 2, 3)
    nn.init.normal_(block.out.weight)
    y = block(x)
    q, k, v = (part(x)[0].flatten(1) for part in (block.theta, block.phi, block.g))
    for place in range(6):
        share = torch.softmax(torch.stack([q[:, place] @ k[:, other] for other in range(6)]), 0)
        told = block.out.weight[:, :, 0, 0] @ (v * share).sum(1)
        assert torch.allclose(y[0].flatten(1)[:, place], x[0].flatten(1)[:, place] + told, atol=1e-5)


def test_any_network_with_maps_will_do_and_stays_as_it_is() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, 2, 1),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, 1, 1),
        nn.Conv2d(4, 6, 3, 2, 1),
        nn.Conv2d(6, 6, 3, 1, 1),
    )
    net.train()
    maps = feature_maps(net, torch.randn(2, 3, 16, 16), ("2", "4"))
    assert [tuple(m.shape) for m in maps] == [(2, 4, 8, 8), (2, 6, 4, 4)] and net.training
    assert not any(m.requires_grad for m in maps) and not any(len(m._forward_hooks) for m in net.modules())
    coarse = feature_maps(net, torch.randn(2, 3, 16, 16), ("4",))
    assert [tuple(m.shape) for m in coarse] == [
        (2, 3, 8, 8),
        (2, 6, 4, 4),
    ]  # the picture itself is the finest
    with pytest.raises(SecateurError, match="no layer"):
        feature_maps(net, torch.randn(1, 3, 16, 16), ("conv9",))
    with pytest.raises(SecateurError, match="1 maps for 2"):
        Pyramid((4, 6), 4)([maps[0]])


def test_links_are_learned_and_both_heads_find_the_object() -> None:
    """Squares of light on dark maps: after a minute's fraction of training masks overlap with the truth."""
    generator = torch.Generator().manual_seed(0)
    masks = torch.zeros(24, 1, 16, 16, dtype=torch.bool)
    for mask in masks[:, 0]:
        top, left = torch.randint(0, 8, (2,), generator=generator).tolist()
        mask[top : top + 7, left : left + 6] = True
    light = masks.float() + 0.3 * torch.randn(24, 1, 16, 16, generator=generator)
    maps = [light, F.avg_pool2d(light, 2), F.avg_pool2d(light, 4)]
    for predict in ("links", "mask"):
        method = make_method("connnet", predict=predict, width=8)
        head = learn(method, lessons([m[:16] for m in maps], masks[:16]), steps=40, lr=2e-2)
        found = read(method, head, [m[16:] for m in maps]).masks[:, 0]
        inside, union = ((part).sum((1, 2)) for part in (found & masks[16:, 0], found | masks[16:, 0]))
        assert (inside / union).mean() > 0.7


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"neighbours": 6}, "neighbours"),
        ({"threshold": 1.0}, "threshold"),
        ({"predict": "links8"}, "predict"),
    ],
)
def test_settings_that_mean_nothing_are_refused(wrong: dict, said: str) -> None:
    with pytest.raises(SecateurError, match=said):
        make_method("connnet", **wrong)
