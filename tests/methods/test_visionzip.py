"""The worked examples and invariants of visionzip."""

import pytest
import torch
from token_examples import CLIP, PLAIN

from secateur.method import make_method
from secateur.testing import token_sets

HIDDEN = torch.tensor([[[1.0], [2.0], [3.0], [5.0], [7.0], [11.0]]])
"""Before the projector, which squares."""
KEYS = torch.tensor([[[[1, 0], [0, 1], [1, 0.1], [0, 1], [0.2, 1], [0, 2]]]])


def sets(keep, **more):
    return token_sets(
        HIDDEN.square(),
        keep,
        keys={"encoder:-2": KEYS},
        hidden={"encoder:-2": HIDDEN, ("encoder:-2", "cls"): torch.tensor([[10.0]])},
        attention={("encoder:-2", "cls"): torch.tensor([[0.1, 0.5, 0.05, 0.05, 0.2, 0.1]])},
        project=torch.square,
        facts=CLIP,
        **more,
    )


def test_cls_the_patch_it_attends_to_and_two_sums():
    """Patch 1 stays. Of 0, 2, 3, 4, 5 every second is a target: 0 gets 2, and 3 the mean of 4 and 5, by their keys."""
    found = make_method("visionzip", contextual=0.5).select(sets(4))
    assert found.index[0, 1:].tolist() == [1, 0, 3] and found.index[0, 0] in (2, 4, 5)
    assert found.features[0, :, 0].tolist() == [10.0**2, 2.0**2, (1 + 3) ** 2, (5 + (7 + 11) / 2) ** 2]


def test_few_tokens_merge_into_one_and_a_single_one_is_cls():
    found = make_method("visionzip").select(sets(2))
    assert found.features[0, :, 0].tolist() == pytest.approx([100, (1 + (2 + 3 + 5 + 7 + 11) / 5) ** 2])
    assert make_method("visionzip").select(sets(1)).features[0, :, 0].tolist() == [100.0]


def test_what_may_stay_whole_stays_as_it_is():
    found = make_method("visionzip").select(sets(6))
    assert found.index.tolist() == [list(range(6))]
    assert torch.equal(found.features, HIDDEN.square())


@pytest.mark.parametrize(("keep", "merged"), [(64, 10), (128, 20), (192, 30)])
def test_the_published_numbers_of_contextual_tokens(keep, merged):
    """The settings of the release's README and the paper's tables: 54 + 10, 108 + 20, 162 + 30."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(1, 576, 3, generator=generator)
    site = f"encoder:{PLAIN.feature_block}"
    given = token_sets(
        features,
        keep,
        keys={site: torch.randn(1, 2, 576, 4, generator=generator)},
        attention={(site, "all"): torch.rand(1, 576, generator=generator)},
        facts=PLAIN,
    )
    found = make_method("visionzip").select(given)
    changed = (found.features[0] != features[0, found.index[0]]).any(1)
    assert changed.tolist() == [False] * (keep - merged) + [True] * merged


def test_without_cls_attention_received_ranks():
    site = f"encoder:{PLAIN.feature_block}"
    received = torch.tensor([[0.1, 0.2, 0.3, 0.15, 0.05, 0.2]])
    given = token_sets(HIDDEN, 3, keys={site: KEYS}, attention={(site, "all"): received}, facts=PLAIN)
    found = make_method("visionzip").select(given)
    assert found.index.tolist() == [[1, 2, 0]]
    assert found.features[0, :, 0].tolist() == pytest.approx([2, 3, 1 + (5 + 7 + 11) / 3])
