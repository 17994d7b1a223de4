"""Common corruptions: each does what its name says, the same every time, more of it at a higher severity."""

import pytest
import torch

from secateur.data.corruptions import COLOUR, EXTRA, SEVERITIES, common, corrupt
from secateur.errors import SecateurError


@pytest.fixture(scope="module")
def pictures():
    """Four smooth coloured pictures of 32 x 32."""
    draw = torch.Generator().manual_seed(0)
    rough = torch.rand(4, 3, 5, 5, generator=draw)
    return torch.nn.functional.interpolate(rough, (32, 32), mode="bicubic").clamp(0, 1)


def moved(before, after):
    return (after - before).square().mean().sqrt().item()


@pytest.mark.parametrize("name", common(extra=True))
def test_each_is_a_picture_again_and_the_same_every_time(name, pictures):
    found = [corrupt(pictures, name, severity) for severity in SEVERITIES]
    for one in found:
        assert one.shape == pictures.shape and 0 <= one.min() and one.max() <= 1
        torch.testing.assert_close(one * 255, (one * 255).round())
    assert torch.equal(found[2], corrupt(pictures, name, 3))
    far = [moved(pictures, one) for one in found]
    if name not in (
        "elastic_transform",
        "glass_blur",
        "saturate",
    ):  # these aren't ordered in the benchmark either
        assert far[4] > far[0] > 0
    if name not in COLOUR:
        grey = corrupt(pictures[:, :1, :8, :8], name, 5)
        assert grey.shape == (4, 1, 8, 8) and moved(pictures[:, :1, :8, :8], grey) > 0


def test_fifteen_are_common_and_four_are_held_out():
    assert len(common()) == 15 and len(common(extra=True)) == 19
    assert set(common(extra=True)) - set(common()) == set(EXTRA)
    assert len(common(1, True)) == 18


def test_noise_has_the_deviation_that_it_is_said_to_have():
    grey = torch.full((8, 3, 64, 64), 0.5)
    assert moved(grey, corrupt(grey, "gaussian_noise", 1)) == pytest.approx(0.04, rel=0.02)
    assert moved(grey, corrupt(grey, "speckle_noise", 3)) == pytest.approx(0.5 * 0.12, rel=0.02)
    # photons: variance mean / count
    assert moved(grey, corrupt(grey, "shot_noise", 3)) == pytest.approx((0.5 / 100) ** 0.5, rel=0.02)
    hit = corrupt(grey, "impulse_noise", 5)
    assert ((hit == 0) | (hit == 1)).float().mean().item() == pytest.approx(0.07, rel=0.05)


def test_large_pictures_have_the_strengths_of_the_benchmark_for_large_ones():
    grey = torch.full((1, 3, 128, 128), 0.5)
    assert moved(grey, corrupt(grey, "gaussian_noise", 1)) == pytest.approx(0.08, rel=0.02)


def test_light_contrast_and_colour_by_hand():
    colour = torch.tensor([0.2, 0.4, 0.4])[None, :, None, None].expand(1, 3, 8, 8).contiguous()
    lighter = corrupt(colour, "brightness", 2)[0, :, 0, 0]  # the value 0.4 becomes 0.5, and the hue stays
    torch.testing.assert_close(lighter, torch.tensor([0.25, 0.5, 0.5]), atol=2e-3, rtol=0)
    paler = corrupt(colour, "saturate", 1)[0, :, 0, 0]  # the saturation 0.5 becomes 0.15
    torch.testing.assert_close(paler, torch.tensor([0.34, 0.4, 0.4]), atol=2e-3, rtol=0)
    halves = torch.tensor([0.2, 0.8]).repeat_interleave(4).expand(1, 1, 8, 8).contiguous()
    flat = corrupt(halves, "contrast", 2)[0, 0, 0]
    torch.testing.assert_close(flat[[0, 7]], torch.tensor([0.35, 0.65]), atol=2e-3, rtol=0)
    black = torch.zeros(1, 1, 8, 8)
    assert corrupt(black, "brightness", 5).mean().item() == pytest.approx(0.3, abs=2e-3)


@pytest.mark.parametrize("name", ["gaussian_blur", "defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "pixelate", "elastic_transform"])  # fmt: skip
def test_what_moves_light_leaves_an_even_picture_even(name):
    even = torch.full((2, 3, 32, 32), 0.6)
    torch.testing.assert_close(corrupt(even, name, 4), even, atol=3e-3, rtol=0)


def test_a_blurred_point_keeps_its_light_and_spreads_as_far_as_it_should():
    point = torch.zeros(1, 1, 33, 33)
    point[0, 0, 16, 16] = 1
    spot = corrupt(point, "gaussian_blur", 5)[0, 0]  # sigma 1
    assert spot[16, 16].item() == pytest.approx(1 / (2 * torch.pi), abs=0.01)
    assert spot.sum().item() == pytest.approx(1, abs=0.03) and torch.equal(spot, spot.T)
    lens = torch.zeros(1, 1, 128, 128)
    lens[0, 0, 64, 64] = 1
    disc = corrupt(lens, "defocus_blur", 1)[0, 0]  # radius 3: 29 pixels
    assert (disc > 0.5 / 29).sum().item() == 29


def test_bad_input():
    x = torch.rand(1, 1, 8, 8)
    with pytest.raises(SecateurError, match="gaussian_noise"):
        corrupt(x, "gausian_noise", 1)
    with pytest.raises(SecateurError, match="no severity 6"):
        corrupt(x, "fog", 6)
    with pytest.raises(SecateurError, match="no colours"):
        corrupt(x, "saturate", 1)
    for wrong in (x[0], 2 * x - 1, x + torch.nan):
        with pytest.raises(SecateurError, match="no pictures in 0..1"):
            corrupt(wrong, "fog", 1)
