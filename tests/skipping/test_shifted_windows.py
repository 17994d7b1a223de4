"""Windows with shift: partition and back, what a shifted window may read, and a block on the active windows alone."""

import pytest
import torch
from torch import nn

from secateur import SecateurError
from secateur.skipping.windows import advance, partition, shift_mask, unpartition, window_means


class Mixing(nn.Module):
    """Adds to each place the mean of those that it may read."""

    def forward(self, windows, mask, policy):
        n = windows.shape[1]
        weights = torch.ones(n, n) if mask is None else mask.float()
        mean = (weights / weights.sum(-1, keepdim=True)) @ windows
        return windows + mean * (1 if policy is None else policy)


def picture(batch=2, size=8):
    return torch.randn(batch, size, size, 3, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("shift", [0, 2])
def test_partition_and_back(shift) -> None:
    x = picture()
    windows = partition(x, 4, shift)
    assert windows.shape == (8, 16, 3)
    assert torch.equal(unpartition(windows, 8, 8, 4, shift), x)
    assert torch.equal(windows[1].view(4, 4, 3), x.roll((-shift, -shift), (1, 2))[0, :4, 4:])


def test_a_shifted_window_reads_only_what_was_beside_it() -> None:
    """By distance: in the rolled map two places of a window may read each other where they are near in the picture."""
    place = torch.stack(torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij"), -1)[None].float()
    where = partition(place, 4, 2)
    near = (where[:, :, None] - where[:, None]).abs().amax(-1) < 4
    assert torch.equal(shift_mask(8, 8, 4, 2), near)
    assert not near.all() and near[0].all()


@pytest.mark.parametrize("shift", [0, 2])
def test_gathered_windows_are_masked_ones_and_the_rest_is_left_bit_for_bit(shift) -> None:
    x, policy = picture(), torch.tensor([1.0, 0, 0, 1, 0, 1, 0, 0])
    gathered, masked = (advance(Mixing(), x, policy, 4, shift, masked=m) for m in (False, True))
    torch.testing.assert_close(gathered, masked, rtol=1e-5, atol=1e-5)
    there = unpartition(policy.view(8, 1, 1).expand(8, 16, 1), 8, 8, 4, shift)[..., 0] > 0
    assert torch.equal(gathered[~there], x[~there]) and torch.equal(masked[~there], x[~there])
    assert (gathered[there] != x[there]).any(-1).all()
    alone = torch.cat(
        [advance(Mixing(), x[i : i + 1], policy[4 * i : 4 * i + 4], 4, shift) for i in range(2)]
    )
    torch.testing.assert_close(gathered, alone, rtol=1e-5, atol=1e-5)


def test_all_and_none() -> None:
    x = picture()
    assert torch.equal(advance(Mixing(), x, torch.zeros(8), 4, 2), x)
    assert torch.equal(
        advance(Mixing(), x, torch.ones(8), 4, 2), advance(Mixing(), x, torch.ones(8), 4, 2, masked=True)
    )


def test_means_are_of_the_places_of_a_window() -> None:
    x = torch.arange(16.0).view(1, 4, 4, 1)
    assert window_means(x, 2).flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
    assert window_means(x.half(), 2, shift=1)[0].item() == 7.5
    assert window_means(x.half(), 2).dtype == torch.float32


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(SecateurError, match="windows of 3 x 3 don't divide a map of 8 x 8"):
        partition(picture(), 3)
    with pytest.raises(SecateurError, match="there are 8 windows"):
        advance(Mixing(), picture(), torch.ones(7), 4)
