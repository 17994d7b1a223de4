"""Heads fitted to patches, and the tasks that have dense labels."""

import pytest
import torch

from secateur import SecateurError
from secateur.families.segmenter import TokenHead
from secateur.tasks import blur, salient_patches
from secateur.tasks.camvid import pairs as camvid_pairs
from secateur.tasks.patch_heads import fit_head, shares_of
from secateur.tasks.registry import load_network, load_task


def test_a_patch_has_the_share_of_pixels_of_each_class() -> None:
    """Two patches side by side: the first half class 1, the second a quarter unlabelled."""
    labels = torch.zeros(1, 14, 28, dtype=torch.int64)
    labels[0, :7, :14] = 1
    labels[0, :7, 14:21] = -100
    torch.testing.assert_close(shares_of(labels, 2), torch.tensor([[0.5, 0.5], [0.75, 0.0]]))


def test_a_head_is_fitted_to_the_end() -> None:
    """Two groups of states, one of them three quarters of class 0: a logistic regression says just that."""
    states = torch.tensor([[4.0, 0, 0, 0], [0, 4.0, 0, 0]]).repeat(8, 1)
    shares = torch.tensor([[0.75, 0.25], [0.1, 0.9]]).repeat(8, 1)
    head = TokenHead(4, 2)
    fit_head(head, states, shares, decay=0)
    torch.testing.assert_close(head(states)[0].softmax(-1), shares, atol=1e-3, rtol=0)


def test_iou_and_mae_by_hand() -> None:
    """Four pixels: object where x > 0; two of the mask's three found, one too many. Probabilities are 0 or 1."""

    class Sign(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.tensor(100.0))

        def forward(self, x):
            return torch.cat([-x, x], 1) * self.scale

    x = torch.tensor([[[[1.0, 1.0], [1.0, -1.0]]]])
    found = salient_patches.measured(Sign(), x, torch.tensor([[[1, 1], [0, 1]]]))
    assert found["iou"] == pytest.approx(0.5) and found["mae"] == pytest.approx(0.5, abs=1e-5)


def test_psnr_counts_the_pixels_that_are_asked_for() -> None:
    net = blur.build()
    x, sharp = torch.full((1, 3, 32, 32), 0.5), torch.full((1, 3, 32, 32), 0.5)
    sharp[..., 16:] = 0.6
    torch.nn.init.zeros_(net.write.weight)
    torch.nn.init.zeros_(net.write.bias)
    right = torch.zeros(1, 32, 32, dtype=torch.bool)
    right[..., 16:] = True
    assert blur.psnr(net, x, sharp, right) == pytest.approx(20, abs=1e-3)
    assert blur.psnr(net, x, sharp) == pytest.approx(20 + 3.0103, abs=1e-3)


def test_what_nobody_published_says_how_it_is_trained() -> None:
    with pytest.raises(SecateurError, match="train-prune blur"):
        load_network("windowed-unet")


@pytest.mark.needs_data
def test_dense_labels_have_the_size_of_the_pictures() -> None:
    x, y = camvid_pairs("test", 1)
    assert (
        x.shape == (1, 3, 280, 378)
        and y.shape == (1, 280, 378)
        and set(y.unique().tolist()) <= {-100, *range(11)}
    )
    x, y = salient_patches.pairs("val", 2)
    assert x.shape == (2, 3, 224, 224) and y.shape == (2, 224, 224) and y.unique().tolist() == [0, 1]
    task = load_task("blur", train=4, test=2)
    assert [tuple(part.shape) for part in task.train] == [(4, 3, 64, 64)] * 2 + [(4, 64, 64)]
