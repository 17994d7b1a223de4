"""The worked examples and invariants of sd-prune, and the search for the cliff."""

import copy
import math

import pytest
import torch
from torch import nn

import secateur
from secateur import SecateurError
from secateur.method import make_method
from secateur.pruning.select import Pattern
from secateur.stats.layer import LayerStats

W = torch.tensor([[1, -2, 0.9, 3], [-0.4, 0.3, 2, -1]])


def test_the_toy_of_the_sheet():
    """Magnitude in the layer drops .3, .4, .9 and the first 1; Wanda drops columns 0 and 1 of both rows."""
    weight, _ = make_method("sd-prune").solve(W, LayerStats(name="layer"), Pattern(4, scope="layer"))
    assert weight.tolist() == [[0, -2, 0, 3], [0, 0, 2, -1]]
    norms = torch.tensor([6.0, 3, 21, 2]).sqrt()
    scores = W.abs() * norms
    assert scores[0].tolist() == pytest.approx([2.449, 3.464, 4.124, 4.243], abs=1e-3)
    assert scores[1].tolist() == pytest.approx([0.980, 0.520, 9.165, 1.414], abs=1e-3)
    mask = Pattern(4, scope="row").select(scores)
    assert torch.where(mask, W, 0).tolist() == torch.tensor([[0, 0, 0.9, 3], [0, 0, 2, -1]]).tolist()


class Draws(nn.Module):
    """A text encoder with 3,404 weights and a denoiser with 8,659: SD2's 340.39 and 865.91 M, a hundred thousandth."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.text_encoder = nn.Sequential(nn.Embedding(5, 37), nn.Linear(37, 92))
        self.unet = nn.Sequential(nn.Linear(7, 1237), nn.LayerNorm(1237))

    def forward(self, words):
        return self.unet(self.text_encoder(words)[..., :7])


def test_the_recommended_shares_come_to_385_thousandths():
    model = Draws()
    words = torch.tensor([[0, 1]])
    pruned = secateur.prune(model, words, method="sd-prune", target="text_encoder=52.5%,unet=65%")
    zeros = {row["name"]: row["size"] - row["kept"] for row in pruned.report["parts"]}
    sizes = {row["name"]: row["size"] for row in pruned.report["parts"]}
    assert sizes == {"text_encoder": 3404, "unet": 8659}
    assert sum(zeros.values()) / sum(sizes.values()) == pytest.approx(0.38527, abs=1e-4)
    assert pruned.report["met"]
    for name, tensor in model.state_dict().items():  # embeddings, norms and biases stay
        if name not in ("text_encoder.1.weight", "unet.0.weight"):
            assert torch.equal(pruned.model.state_dict()[name], tensor)


def test_parts_are_independent_and_masks_nested():
    words = torch.tensor([[0, 1]])
    both = secateur.prune(Draws(), words, method="sd-prune", target="text_encoder=50%,unet=60%")
    first = secateur.prune(Draws(), words, method="sd-prune", target="unet=60%")
    second = secateur.prune(first.model, words, method="sd-prune", target="text_encoder=50%")
    a, b = both.model.state_dict(), second.model.state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)
    less = secateur.prune(Draws(), words, method="sd-prune", target="text_encoder=70%,unet=80%")
    for name, mask in both.plan.masks.items():
        assert not (mask & ~less.plan.masks[name]).any()


def test_weights_that_are_zero_already_count():
    model = Draws()
    with torch.no_grad():
        model.unet[0].weight.view(-1)[:4000] = 0
    pruned = secateur.prune(model, torch.tensor([[0]]), method="sd-prune", target="unet=65%")
    assert int((pruned.model.unet[0].weight == 0).sum()) == 4000
    more = secateur.prune(model, torch.tensor([[0]]), method="sd-prune", target="unet=40%")
    assert int((more.model.unet[0].weight == 0).sum()) == 8659 - int(0.4 * 8659)


class Uneven(nn.Module):
    def __init__(self):
        super().__init__()
        self.large, self.small = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        with torch.no_grad():
            self.large.weight.copy_(torch.arange(16.0).reshape(4, 4) + 100)
            self.small.weight.copy_(torch.arange(16.0).reshape(4, 4) + 1)

    def forward(self, x):
        return self.small(self.large(x))


def test_one_ranking_over_a_part_empties_the_layer_of_small_weights():
    x = torch.ones(1, 4)
    local = secateur.prune(Uneven(), x, method="sd-prune", target="50%").model
    assert [int((p == 0).sum()) for p in local.parameters()] == [8, 8]
    part = secateur.prune(Uneven(), x, method="sd-prune", target="60%", scope="part").model
    assert [int((p == 0).sum()) for p in part.parameters()] == [0, 13]
    assert part.small.weight.flatten()[-3:].tolist() == [14, 15, 16]


def test_layers_outside_the_blocks_count_with_every_weight_method(tiny_llama):
    model = tiny_llama()
    ids = torch.randint(0, 64, (2, 8))
    inner = secateur.prune(model, method="wanda", target="50%", data=ids)
    outer = secateur.prune(model, method="wanda", target="50%", data=ids, everywhere=True)
    assert "lm_head.weight" not in inner.plan.masks and "lm_head.weight" in outer.plan.masks
    size = sum(m.numel() for m in outer.plan.masks.values())
    assert sum(int(m.sum()) for m in outer.plan.masks.values()) == size // 2


def test_the_cliff_is_found_by_bisection():
    judged = []

    def quality(model):
        """Falls off behind 40 % of zeros."""
        share = float((model.large.weight == 0).float().mean())
        judged.append(share)
        return 1.0 - 0.1 * share if share <= 0.4 else 0.2

    model = Uneven()
    before = copy.deepcopy(model.state_dict())
    found = secateur.threshold(model, quality, tolerance=0.05, step=0.0625, inputs=torch.ones(1, 4))
    assert found.removed == 0.375 and found.dense == 1.0 and found.quality == pytest.approx(0.9625)
    assert found.slope == pytest.approx((0.9625 - 0.2) / 0.0625)
    assert len(judged) <= 2 + 5  # the dense model twice, then log2(16) and the step behind
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    of_part = secateur.threshold(
        model, quality, part="large", tolerance=0.05, step=0.25, inputs=torch.ones(1, 4)
    )
    assert of_part.removed == 0.25


def test_a_model_that_never_breaks_has_no_cliff():
    found = secateur.threshold(Uneven(), lambda model: 1.0, step=0.25, inputs=torch.ones(1, 4))
    assert found.removed == 0.75 and math.isnan(found.slope)


def test_qualities_that_are_drawn_anew_are_refused():
    values = iter([1.0, 0.5])
    with pytest.raises(SecateurError, match="same model is 1 and then 0.5"):
        secateur.threshold(Uneven(), lambda model: next(values), inputs=torch.ones(1, 4))
    with pytest.raises(SecateurError, match="step 2"):
        secateur.threshold(Uneven(), lambda model: 1.0, step=2.0)


def test_a_part_that_there_is_not_is_told_before_anything_is_judged():
    with pytest.raises(SecateurError, match="no part 'unet2'.*text_encoder, unet"):
        secateur.threshold(Draws(), lambda model: pytest.fail("judged"), part="unet2")


class Drawn(nn.Module):
    """What a denoiser has beside linear layers."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.enter, self.leave = nn.Conv2d(4, 5, 3), nn.ConvTranspose2d(5, 4, 3)  # 180 weights each

    def forward(self, x):
        return self.leave(self.enter(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_35_of_180_weights_of_a_convolution_are_63_though_floats_say_62_999(dtype):
    model = Drawn().to(dtype)
    assert 0.35 * 180 < 63
    pruned = secateur.prune(model, torch.ones(1, 4, 5, 5, dtype=dtype), method="sd-prune", target="65%").model
    weight, before = pruned.enter.weight.flatten(), model.enter.weight.flatten()
    gone = before.float().abs().argsort(stable=True)[:63]
    assert int((weight == 0).sum()) == 63 and not weight[gone].any()
    assert torch.equal(pruned.leave.weight, model.leave.weight)
    assert pruned.enter.weight.dtype == dtype


def test_where_nothing_leaves_every_bit_stays():
    model, words = Draws(), torch.tensor([[0, 1]])
    same = secateur.prune(model, words, method="sd-prune", target="text_encoder=100%,unet=100%").model
    assert torch.equal(same(words), model(words))
