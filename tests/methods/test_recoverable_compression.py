"""The worked examples and invariants of recoverable compression."""

from functools import partial

import pytest
import torch

from secateur.methods.recoverable_compression import RecoverableCompression
from secateur.testing import token_sets
from secateur.tokens.counts import outlier_factor, outliers
from secateur.tokens.reduce import clusters
from secateur.tokens.state import Missing


def row(*numbers):
    return torch.tensor([numbers], dtype=torch.float32)


def kept(mask):
    return mask[0].nonzero().squeeze(1).tolist()


OUTLIERS = row(
    0.0116, 0.0132, 0.2000, 0.0140, 0.0101, 0.0109, 0.5000, 0.0147, 0.0157, 0.0174, 0.0182, 0.0189
)  # fmt: skip


def recoverable_sets(n=60, keep=12, **more):
    random = partial(torch.randn, generator=torch.Generator().manual_seed(3))
    hidden = random(1, n, 6)
    return token_sets(
        hidden,
        keep,
        queries={("encoder:-1", "cls"): 3 * random(1, 2, 4), "encoder:-1": random(1, 2, n, 4)},
        keys={"encoder:-1": random(1, 2, n, 4), ("encoder:-1", "cls"): random(1, 2, 4)},
        hidden={"encoder:-2": hidden, "encoder:-1": random(1, n, 6)},
        project=lambda merged: merged,
        given={"text_encoder": lambda tokens, sets: random(1, n) ** 3},
        **more,
    )


def test_recoverable_outliers():
    """Spec: recoverable-compression (a)."""
    expected = row(
        -1.153, -0.882, -73.716, -0.980, -1.153, -1.153, -114.546, -1.035, -0.888, -1.170, -1.170, -1.170
    )  # fmt: skip
    torch.testing.assert_close(-outlier_factor(OUTLIERS, 3).float(), expected, atol=1e-3, rtol=0)
    assert kept(outliers(OUTLIERS, 3)) == [2, 6]
    assert kept(outliers(OUTLIERS, 10)) == [6] and not outliers(OUTLIERS, 20).any()


def test_recoverable_cluster():
    """Spec: recoverable-compression (a)."""
    x, v = torch.tensor([[1.0, 0], [0, 1], [2, 2]]), torch.tensor([0.3, 0.1, 0.05])
    centres, members, merged = clusters(x, v, torch.ones(3, 2), torch.zeros(3), 1, 32)
    assert centres.tolist() == [0] and members.tolist() == [1, 2]
    torch.testing.assert_close(merged, torch.tensor([[1.1, 0.2]]))
    torch.testing.assert_close(v[members] @ x[members], torch.tensor([0.1, 0.2]))


@pytest.mark.parametrize("keep", [None, 1, 2, 7, 30, 59])
def test_recoverable_meets_a_target_and_copies_main_tokens(keep):
    method = RecoverableCompression(neighbours=(8, 8))
    sets = recoverable_sets(keep=keep or 60, target=keep)
    found = method.select(sets)
    index = found.index[0]
    assert (index >= 0).all() and len(index.unique()) == len(index)
    if keep is not None:
        assert len(index) == keep
    copied = (found.features[0] == sets.features[0, index]).all(1)
    assert copied[0] and len(index) < 60


def test_recoverable_counts_clusters_by_channels_as_released():
    """Spec: recoverable-compression, step 6: 3 outliers among 60 give int(1024 * 3 / 60) = 51, or of 20 main tokens 1."""
    values = torch.cat([torch.linspace(0, 1, 57), torch.tensor([50.0, 80.0, 120.0])])
    for compat, expected in (("code", 51), ("paper", 1)):
        method = RecoverableCompression(compat=compat)
        assert int(outliers(values[None], 10).sum()) == 3
        assert method.count(values, torch.arange(60), method.number(20, 1024)) == expected


def test_recoverable_says_what_is_missing():
    sets = recoverable_sets()
    sets.given.clear()
    with pytest.raises(Missing, match="text encoder"):
        RecoverableCompression().select(sets)
