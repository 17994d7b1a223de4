"""Integrated gradients, occlusion and SmoothGrad: numbers worked out by hand, and what they sum to."""

import sys

import numpy as np
import pytest
import torch
from torch import nn

import secateur
from secateur import SecateurError

W = torch.tensor([[2.0, -1.0, 0.5, 3.0], [1.0, 1.0, -4.0, 0.0]])
X = torch.tensor([[[1.0, 2.0], [-2.0, 4.0]]])
"""A picture [1, 2, 2]."""


def linear():
    """Logits of two classes from the four pixels."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    with torch.no_grad():
        net[1].weight.copy_(W)
        net[1].bias.copy_(torch.tensor([5.0, -7.0]))
    return net


class Of(nn.Module):
    """One function of the pixels as the only logit."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x.flatten(1))[:, None]


def smooth():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Conv2d(4, 4, 3), nn.GELU(), nn.Flatten(), nn.Linear(64, 3)
    ).double()


def picture(count=None):
    generator = torch.Generator().manual_seed(3)
    shape = (3, 8, 8) if count is None else (count, 3, 8, 8)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(("target", "row"), [(0, W[0]), (1, W[1])])
@pytest.mark.parametrize("baseline", [0.0, 1.5])
def test_of_a_linear_model_every_way_gives_weight_times_distance(target, row, baseline):
    expected = row.view(2, 2) * (X[0] - baseline)
    for method, settings in (
        ("integrated-gradients", {"steps": 3, "baseline": baseline}),
        ("occlusion", {"window": 1, "fill": baseline}),
    ):
        found = secateur.saliency(linear(), X, method, target, **settings)
        assert torch.allclose(found.values, expected, atol=1e-5), method
    found = secateur.saliency(linear(), X, "smoothgrad", target, samples=2)
    assert torch.allclose(found.attribution[0], row.view(2, 2), atol=1e-6)


def test_integrated_gradients_see_what_a_saturated_gradient_does_not():
    """1 - relu(1 - x) at 2 from 0 (Sundararajan et al., section 2.1): the gradient there is 0, the integral 1."""
    net, x = Of(lambda v: 1 - (1 - v[:, 0]).relu()), torch.tensor([[[2.0]]])
    with pytest.raises(SecateurError, match="zero everywhere"):
        secateur.saliency(net, x, "gradient", 0)
    found = secateur.saliency(net, x, "integrated-gradients", 0, steps=500)
    assert found.values.item() == pytest.approx(1, abs=2e-3)


def test_a_product_is_divided_evenly():
    """Along (2t, 3t) the gradients of x y are 3t and 2t, so each factor gets 2 * 3 / 2; two Gauss points are exact."""
    net, x = Of(lambda v: v[:, 0] * v[:, 1]), torch.tensor([[[2.0, 3.0]]])
    assert torch.allclose(
        secateur.saliency(net, x, "integrated-gradients", 0, steps=2).values, torch.tensor([[3.0, 3.0]])
    )
    # each is covered alone, so both lose the whole product
    assert torch.allclose(
        secateur.saliency(net, x, "occlusion", 0, window=1).values, torch.tensor([[6.0, 6.0]])
    )


def test_integrated_gradients_add_up_to_the_difference_of_the_logits():
    net, x = smooth(), picture(2)
    found = secateur.saliency(net, x, "integrated-gradients", [2, 0], baseline=0.3)
    with torch.no_grad():
        lost = (net(x) - net(torch.full_like(x, 0.3)))[[0, 1], [2, 0]]
    assert torch.allclose(found.values.sum((1, 2)).double(), lost, atol=1e-5)
    coarse = secateur.saliency(net, x, "integrated-gradients", [2, 0], baseline=0.3, steps=1).values
    assert (coarse.sum((1, 2)) - lost).abs().max() > 1e-3, "one step isn't the integral"


def test_integrated_gradients_are_the_sum_over_gauss_points():
    net, x = smooth(), picture()[None]
    at, weights = np.polynomial.legendre.leggauss(7)
    total = torch.zeros_like(x)
    for place, weight in zip((at + 1) / 2, weights / 2, strict=True):
        point = (place * x).requires_grad_(True)
        total += weight * torch.autograd.grad(net(point)[0, 1], point)[0]
    found = secateur.saliency(net, x, "integrated-gradients", 1, steps=7)
    assert torch.allclose(found.attribution.double(), total * x, atol=1e-6)


@pytest.mark.parametrize(("window", "stride"), [(None, None), (3, 2), (4, 4), (20, None)])
def test_occlusion_by_loops(window, stride):
    """The last place of the square is moved up to the edge, or cut off there: captum covers what is left over too."""
    net, x = smooth(), picture()
    side = min(window or 1, 8)
    step = stride or -(-side // 2)
    with torch.no_grad():
        whole = net(x[None])[0, 2]
        lost, times = torch.zeros(8, 8).double(), torch.zeros(8, 8).double()
        starts = [step * i for i in range(-(-(8 - side) // step) + 1)]
        for top in starts:
            for left in starts:
                covered = x.clone()
                covered[:, top : top + side, left : left + side] = 0
                lost[top : top + side, left : left + side] += whole - net(covered[None])[0, 2]
                times[top : top + side, left : left + side] += 1
    settings = {"window": window, "stride": stride}
    found = secateur.saliency(net, x, "occlusion", 2, **settings)
    assert torch.allclose(found.values.double(), lost / times, atol=1e-6)
    assert torch.allclose(found.attribution.sum(0), found.values)


def test_smoothgrad_by_loops():
    net, x = smooth(), picture()[None]
    sigma = 0.2 * float(x.max() - x.min())
    torch.manual_seed(5)
    # captum draws the noise of a batch of copies at once
    noise = torch.cat([torch.normal(0, torch.full((n, 3, 8, 8), sigma)) for n in (8, 2)]).double()
    copies = (x + noise).requires_grad_(True)
    expected = torch.autograd.grad(net(copies)[:, 1].sum(), copies)[0].mean(0)
    before = torch.get_rng_state()
    found = secateur.saliency(net, x[0], "smoothgrad", 1, samples=10, noise=0.2, seed=5)
    assert torch.equal(torch.get_rng_state(), before), "the caller's random state is left alone"
    assert torch.allclose(found.attribution.double(), expected, atol=1e-6)
    assert torch.equal(found.values, found.attribution.abs().amax(0))
    other = secateur.saliency(net, x[0], "smoothgrad", 1, samples=10, noise=0.2, seed=6)
    assert not torch.allclose(found.values, other.values)


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("integrated-gradients", {"steps": 0}),
        ("occlusion", {"window": 0}),
        ("occlusion", {"stride": -1}),
        ("smoothgrad", {"samples": 0}),
        ("smoothgrad", {"noise": 0.0}),
    ],
)
def test_settings_out_of_range_are_named(method, settings):
    with pytest.raises(SecateurError, match=next(iter(settings))):
        secateur.saliency(smooth(), picture(), method, 0, **settings)


def test_a_stride_that_leaves_pixels_uncovered_is_refused():
    with pytest.raises(SecateurError, match="never covered"):
        secateur.saliency(smooth(), picture(), "occlusion", 0, window=2, stride=3)


@pytest.mark.parametrize("method", ["integrated-gradients", "occlusion", "smoothgrad"])
def test_half_precision(method):
    exact, half = (
        secateur.saliency(smooth().to(dtype), picture(), method, 1).values.flatten()
        for dtype in (torch.float64, torch.bfloat16)
    )
    assert half.dtype == torch.float32 and torch.corrcoef(torch.stack([exact, half]))[0, 1] > 0.9


@pytest.mark.parametrize("method", ["integrated-gradients", "occlusion", "smoothgrad"])
def test_without_captum_it_says_what_to_install(method, monkeypatch):
    monkeypatch.setitem(sys.modules, "captum.attr", None)
    with pytest.raises(SecateurError, match=r"secateur\[saliency\]"):
        secateur.saliency(linear(), X, method, 0)
