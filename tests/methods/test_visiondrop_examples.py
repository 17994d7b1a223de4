"""The worked examples and invariants of visiondrop examples."""

from functools import partial

import pytest
import torch

from secateur.method import make_method
from secateur.testing import token_sets


def visiondrop_sets(**more):
    random = partial(torch.rand, generator=torch.Generator().manual_seed(5))
    given = {
        "keys": {"encoder:-2": random(1, 2, 16, 4)},
        "hidden": {("encoder:-2", "cls"): torch.full((1, 3), 7.0)},
        "project": lambda hidden: 2 * hidden,
    }
    return token_sets(random(1, 16, 3), keep=4, **{**given, **more})


def test_visiondrop_passes_the_cls_token_on_and_merges_one_in_eight():
    """Spec: visiondrop, steps 1 to 3: 1.5 x 4 = 6 tokens: CLS, four dominant, one contextual."""
    scores = torch.linspace(0, 1, 16)[None]
    sets = visiondrop_sets(attention={("encoder:-2", "cls"): scores})
    found = make_method("visiondrop").before(sets)
    assert found.features[0, 0].tolist() == [14.0] * 3
    assert found.index[0, 1:5].tolist() == [12, 13, 14, 15] and found.index.shape == (1, 6)
    assert torch.equal(found.features[0, 1:5], sets.features[0, 12:])
    assert found.index[0, 5] == 0 and found.index[0, 0] not in found.index[0, 1:]


def test_visiondrop_merges_before_the_projector():
    """By hand: R = all but token 3; targets 0 (every third of three, one of them), mean of 1 and 2 added, then squared."""
    hidden = torch.tensor([[[1.0], [2.0], [4.0], [9.0]]])
    sets = token_sets(
        hidden.square(),
        keep=2,
        keys={"encoder:-2": torch.ones(1, 1, 4, 2)},
        hidden={"encoder:-2": hidden},
        attention={("encoder:-2", "all"): torch.tensor([[0.0, 0.1, 0.2, 0.7]])},
        project=torch.square,
    )
    method = make_method("visiondrop", first=1.0000001)
    found = method.before(sets)
    assert found.index.tolist() == [[3, 0]]
    assert found.features[0, :, 0].tolist() == [81.0, (1 + (2 + 4) / 2) ** 2]


def test_visiondrop_without_cls_uses_attention_received():
    sets = visiondrop_sets(attention={("encoder:-2", "all"): torch.linspace(1, 0, 16)[None]}, hidden={})
    found = make_method("visiondrop").before(sets)
    assert found.index[0].tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(("target", "sizes"), [(32, [(42, 6), (30, 5), (22, 4), (16, 3)])])
def test_visiondrop_schedule(target, sizes):
    """Spec: visiondrop: the published setting for 32 tokens."""
    sets = token_sets(torch.zeros(1, 576, 1), keep=target)
    method = make_method("visiondrop")
    found = [tuple(int(part) for part in method.counts(sets, stage)) for stage in range(4)]
    assert found == sizes and sum(map(sum, found)) * 8 / 32 == 32.0
