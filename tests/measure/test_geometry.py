"""Angles, lengths and margins of last features: the sheet's numbers, and what must hold for any classifier."""

import numpy as np
import pytest
import torch
from torch import nn

from secateur.errors import SecateurError
from secateur.measure.geometry import (
    distances,
    fragile,
    geometry,
    occlusion,
    of_model,
    placed,
    robust,
    spanning_tree,
)

X = torch.tensor([[3.0, 4], [1, 0], [0, -2]], dtype=torch.float64)
W = torch.tensor([[1.0, 0], [0, 2], [-1, -1]], dtype=torch.float64)
Y = torch.tensor([1, 0, 2])
TOL = {"atol": 1e-6, "rtol": 0}


def close(found, wanted):
    torch.testing.assert_close(found, torch.tensor(wanted, dtype=torch.float64), **TOL)


def test_the_sheets_example():
    found = geometry(X, W, None, Y)
    close(found.norm, [5.0, 1, 2])
    close(found.angle, [36.869898, 0, 45])
    close(found.margin, [2.236068, 0.447214, 0.894427])
    assert found.accuracy == 1 and found.predicted.tolist() == [1, 0, 2]
    other = geometry(X, W, None, torch.tensor([1, 1, 2]))
    close(other.angle[1], 90.0)
    close(other.margin[1], -0.447214)


def test_the_sheets_distances_and_spanning_tree():
    def metrics(a, b, c):
        return {"angle": torch.tensor(a), "norm": torch.tensor(b), "margin": torch.tensor(c)}

    found = distances(
        [
            metrics([10.0, 20, 30], [1.0, 2, 4], [0.5, 0.1, -0.2]),
            metrics([12.0, 20, 33], [1.1, 2, 3], [0.4, 0.2, -0.1]),
            metrics([40.0, 70, 80], [3.0, 1, 9], [-1.0, 0.9, 0.1]),
        ]
    )
    np.testing.assert_allclose(found[[0, 0, 1], [1, 2, 2]], [0.569476, 5.304404, 5.226066], atol=1e-6)
    assert [edge[:2] for edge in spanning_tree(found)] == [(0, 1), (1, 2)]
    np.testing.assert_allclose(np.linalg.norm(placed(found)[0] - placed(found)[1]), 0.569476, atol=1e-6)


def test_the_sheets_occlusion():
    x = torch.tensor([2.0, 1, 1, 0], dtype=torch.float64)
    seen = torch.stack([x, *(x * (torch.arange(4) != i) for i in range(4))])
    pairs = seen.view(-1, 2, 2).sum(2)
    found = geometry(pairs, torch.eye(2, dtype=torch.float64), None, torch.zeros(5, dtype=torch.int64))
    table = torch.stack([found.angle, found.norm, found.margin], 1)
    close(table[0], [18.434949, 3.162278, 1.414214])
    close(
        table[1:] - table[0],
        [
            [26.565051, -1.748064, -1.414214],
            [8.130102, -0.926210, -0.707107],
            [-18.434949, -0.162278, 0.707107],
            [0, 0, 0],
        ],
    )


def test_the_sheets_occlusion_on_a_picture():
    class Sums(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(2, 2, bias=False, dtype=torch.float64)
            self.head.weight.data = torch.eye(2, dtype=torch.float64)

        def forward(self, x):
            return self.head(x[:, 0].sum(2))

    picture = torch.tensor([[[2.0, 1], [1, 0]]], dtype=torch.float64)
    base, change = occlusion(Sums(), picture, 0, patch=1, stride=1, batch=3)
    for name, value, moved in (
        ("angle", 18.434949, [[26.565051, 8.130102], [-18.434949, 0]]),
        ("norm", 3.162278, [[-1.748064, -0.926210], [-0.162278, 0]]),
        ("margin", 1.414214, [[-1.414214, -0.707107], [0.707107, 0]]),
    ):
        assert getattr(base, name).item() == pytest.approx(value, abs=1e-5)
        np.testing.assert_allclose(change[name], moved, atol=1e-5)
    whole = occlusion(Sums(), picture, 0, patch=2, stride=2, fill=1.0)[1]["norm"]
    assert whole.shape == (1, 1) and whole.item() == pytest.approx(8**0.5 - 10**0.5, abs=1e-5)
    with pytest.raises(SecateurError, match="a patch of 3 in steps of 2 doesn't fit"):
        occlusion(Sums(), picture, 0, patch=3)


@pytest.fixture
def drawn():
    g = torch.Generator().manual_seed(0)
    x, w = (torch.randn(n, 6, generator=g, dtype=torch.float64) for n in (40, 5))
    return x, w, torch.randn(5, generator=g, dtype=torch.float64), torch.randint(5, (40,), generator=g)


def test_a_margin_is_positive_where_the_answer_is_right_and_is_the_distance_to_the_boundary(drawn):
    x, w, b, y = drawn
    found = geometry(x, w, b, y)
    assert torch.equal(found.margin > 0, (x @ w.T + b).argmax(1) == y)
    # a step of that length towards the nearest boundary ends on it
    logits = x @ w.T + b
    p = logits.argmax(1)
    for i in range(len(x)):
        gaps = [
            (logits[i, p[i]] - logits[i, j]) / (w[p[i]] - w[j]).norm() if j != p[i] else torch.inf
            for j in range(5)
        ]
        j = int(np.argmin(gaps))
        moved = x[i] - (w[p[i]] - w[j]) / (w[p[i]] - w[j]).norm() * found.margin[i].abs()
        at = w @ moved + b
        assert at[p[i]] == pytest.approx(at[j].item(), abs=1e-9)


def test_what_changes_nothing_changes_nothing(drawn):
    x, w, _, y = drawn
    one = geometry(x, w, None, y)
    longer = geometry(3 * x, w, None, y)
    torch.testing.assert_close(longer.norm, 3 * one.norm)
    torch.testing.assert_close(longer.margin, 3 * one.margin)
    torch.testing.assert_close(longer.angles, one.angles)
    turn = torch.linalg.qr(
        torch.randn(6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    )[0]
    turned = geometry(x @ turn, w @ turn, None, y)
    torch.testing.assert_close(turned.angles, one.angles)
    torch.testing.assert_close(turned.margin, one.margin)
    shifted = geometry(x, w + 1.5, None, y)
    torch.testing.assert_close(shifted.margin, one.margin)
    assert not torch.allclose(shifted.angles, one.angles)
    assert distances([one, one]).max() == 0


def test_edges():
    same = geometry(
        torch.zeros(1, 2),
        torch.tensor([[1.0, 0], [1, 0], [0, 1]]),
        torch.tensor([2.0, 2, 0]),
        torch.tensor([0]),
    )
    assert same.angle.item() == 90 and same.margin.item() == pytest.approx(2 / 2**0.5)
    with pytest.raises(SecateurError, match="labels reach from 0 to 3 in 3 classes"):
        geometry(X, W, None, torch.tensor([0, 1, 3]))
    with pytest.raises(SecateurError, match="don't fit"):
        geometry(X, W[:, :1], None, Y)
    with pytest.raises(SecateurError, match="the same samples"):
        distances([geometry(X, W, None, Y), geometry(X[:2], W, None, Y[:2])])


def test_of_a_model_whatever_the_batch():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3))
    x, y = torch.randn(30, 1, 4, 4), torch.arange(30) % 3
    found, other = of_model(net, x, y), of_model(net, x, y, batch=7)
    torch.testing.assert_close(found.margin, other.margin)
    assert found.accuracy == pytest.approx((net(x).argmax(1) == y).double().mean().item())
    assert net.training and found.summary()["norm_mean"] == pytest.approx(
        net[:3](x).norm(dim=1).mean().item(), rel=1e-5
    )
    with pytest.raises(SecateurError, match="doesn't end in a linear layer"):
        of_model(nn.Sequential(*net, nn.Softmax(1)), x, y)


def test_robust_and_fragile_samples():
    clean = torch.tensor([1.0, 0.5, 0.2, -0.1])
    margins = torch.tensor([[0.5, -0.2, 0.1, 0.3], [0.4, 0.3, -0.9, -0.2]])
    assert robust(margins).tolist() == [True, False, False, False]
    assert fragile(clean, margins).tolist() == [2, 1]
