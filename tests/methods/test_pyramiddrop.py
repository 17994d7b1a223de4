"""The worked examples and invariants of pyramiddrop."""

import pytest
import torch
from token_examples import CLIP

from secateur.families.vlm import Facts
from secateur.method import make_method
from secateur.testing import token_sets


def cut(scores, total, target, number):
    """Kept positions at the cut of that number, of tokens with these scores of `total` at the start."""
    scores = torch.tensor([scores])
    stage = make_method("pyramiddrop").stages(CLIP)[number]
    share = target if isinstance(target, float) else target / total
    sets = token_sets(
        torch.zeros(1, scores.shape[1], 2),
        max(1, round(total * share)),
        attention={(stage.records[0], "last"): scores},
        facts=CLIP,
        target=target,
        total=torch.tensor([total]),
    )
    return stage.select(sets)[0].nonzero()[:, 0].tolist()


def test_the_best_half_a_quarter_an_eighth_stay():
    scores = [0.10, 0.02, 0.05, 0.03, 0.20, 0.01, 0.04, 0.06]
    assert cut(scores, 8, 0.125, 0) == [0, 2, 4, 7]
    assert cut([0.1, 0.3, 0.05, 0.2], 8, 0.125, 1) == [1, 3]
    assert cut([0.1, 0.3], 8, 0.125, 2) == [1]


@pytest.mark.parametrize(
    ("total", "target", "counts"),
    [
        (576, 0.125, [288, 144, 72]),  # the published ratios
        (576, 0.1, [267, 124, 57]),  # 576 * .46416, .21544, .1 = 267.4, 124.1, 57.6, cut down
        (576, 64, [276, 133, 64]),  # 576 * (1/9) ** (1/3) = 276.9, (1/9) ** (2/3) = 133.2
        (7, 0.125, [3, 1, 1]),
        (3, 0.01, [1, 1, 1]),
    ],
)
def test_counts(total, target, counts):
    scores = torch.rand(total, generator=torch.Generator().manual_seed(0)).tolist()
    assert [len(cut(scores, total, target, number)) for number in range(3)] == counts


def test_cuts_come_before_the_layers_that_rank_them():
    for layers, expected in ((32, [8, 16, 24]), (40, [10, 20, 30]), (4, [1, 2, 3])):
        stages = make_method("pyramiddrop").stages(Facts(layers=layers, blocks=24))
        assert [stage.at for stage in stages] == [f"layer:{n}" for n in expected]
        assert [stage.records for stage in stages] == [(f"layer:{n}:peek",) for n in expected]
