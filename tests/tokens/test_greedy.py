"""The greedy engine against the sheets' worked examples, brute force and a loop over single sets."""

import itertools
import math

import pytest
import torch

from secateur import SecateurError
from secateur.tokens import greedy

ANGLES = [0, 10, 20, 90, 100, 200]


def circle(degrees, norms=None):
    angles = torch.tensor([[math.radians(a) for a in degrees]], dtype=torch.float64)
    norms = torch.ones(len(degrees)) if norms is None else torch.tensor(norms)
    return torch.stack([angles.cos(), angles.sin()], 2) * norms[None, :, None]


def plain(distance, keep, first=None, total=False):
    """One set, pick by pick, as the papers write it."""
    n = len(distance)
    chosen = [] if first is None else [first]
    if first is None:
        chosen.append(
            max(range(n), key=lambda i: min([distance[i][j] for j in range(n) if j != i], default=0))
        )
    while len(chosen) < keep:
        rest = [i for i in range(n) if i not in chosen]
        join = sum if total else min
        chosen.append(max(rest, key=lambda i: join(distance[j][i] for j in chosen)))
    return chosen[:keep]


def test_farthest_first_on_the_circle_gives_the_published_order_and_values():
    """Spec divprune (a): norms must not matter."""
    features = circle(ANGLES, [1.0, 2, 1, 3, 1, 0.5])
    picks = greedy.max_min(greedy.cosine_distance(features), 4)
    assert picks.order.tolist() == [[5, 2, 4, 0]]
    expected = torch.tensor([[1.173648, 2.000000, 0.826352, 0.060307]])
    assert torch.allclose(picks.values, expected, atol=2e-6)
    assert picks.mask(6).nonzero()[:, 1].tolist() == [0, 2, 4, 5]


def test_the_known_example_where_greedy_is_far_from_the_optimum():
    """Spec divprune (b): directions 0, 19, 27, 34, 57 degrees."""
    picks = greedy.max_min(greedy.cosine_distance(circle([0, 19, 27, 34, 57])), 4)
    assert picks.order.tolist() == [[4, 0, 2, 1]]
    assert picks.values[0, -1].item() == pytest.approx(0.009732, abs=2e-6)


@pytest.mark.parametrize("pivot, order", [(0, [0, 5, 4, 1]), (3, [3, 5, 0, 1])])
def test_max_sum_from_a_pivot(pivot, order):
    """Spec todre (a)."""
    distance = greedy.cosine_distance(circle(ANGLES))
    assert greedy.max_sum(distance, 4, first=torch.tensor([pivot])).order.tolist() == [order]


def test_k_center_from_a_pivot():
    """Spec todre (a): farthest first from pivot 0."""
    distance = greedy.cosine_distance(circle(ANGLES))
    assert greedy.k_center(distance, 4).order.tolist() == [[0, 5, 4, 2]]
    assert greedy.k_center(distance, 4, first=torch.tensor([3])).order[0, 0] == 3


def text_and_picture(tau_text=0.02):
    text = torch.tensor([[[0.9, 0.1, 0.0, 0.2]]])
    picture = torch.tensor([[[1, 0.8, 0.1, 0], [0.8, 1, 0.2, 0], [0.1, 0.2, 1, 0.3], [0, 0, 0.3, 1]]])
    own = 0.5 * (picture / 0.2).softmax(-1) / 4
    assert torch.allclose(own[0, 0], torch.tensor([0.090205, 0.033185, 0.001002, 0.000608]), atol=1e-6)
    return torch.cat([(text / tau_text).softmax(-1), own], 1)


@pytest.mark.parametrize("lazy", [False, True])
def test_coverage_gives_the_published_order_and_gains(lazy):
    """Spec mmtok (a)."""
    picks = greedy.coverage(text_and_picture(), 4, lazy=lazy)
    assert picks.order.tolist() == [[0, 3, 2, 1]]
    expected = torch.tensor([[1.125336, 0.121214, 0.114404, 0.056726]])
    assert torch.allclose(picks.values, expected, atol=2e-6)
    silent = greedy.coverage(text_and_picture(1e9), 4, lazy=lazy)
    assert silent.order.tolist() == [[1, 3, 2, 0]]
    assert silent.values[0, 0].item() == pytest.approx(0.375891, abs=1e-6)
    allowed = torch.tensor([[False, True, True, True]])
    assert sorted(greedy.coverage(text_and_picture(), 2, allowed, lazy=lazy).order[0].tolist()) == [1, 3]


CRITERIA = {
    "max_min": lambda x, k, valid: greedy.max_min(greedy.cosine_distance(x, valid), k, valid),
    "max_sum": lambda x, k, valid: greedy.max_sum(greedy.cosine_distance(x, valid), k, valid),
    "k_center": lambda x, k, valid: greedy.k_center(greedy.cosine_distance(x, valid), k, valid),
    "coverage": lambda x, k, valid: greedy.coverage(soft(x, valid), k, valid),
    "facility": lambda x, k, valid: greedy.facility_location(1 - greedy.cosine_distance(x, valid), k, valid),
}


def soft(x, valid):
    likeness = greedy.directions(x, valid) @ greedy.directions(x, valid).mT
    if valid is not None:
        likeness = likeness.masked_fill(~valid[:, None, :], -torch.inf)
    weights = (likeness / 0.2).softmax(-1)
    return weights if valid is None else weights * valid[..., None]


@pytest.mark.parametrize("criterion", CRITERIA)
def test_a_padded_batch_with_its_own_counts_equals_single_sets(criterion):
    run, sizes, keep = CRITERIA[criterion], [9, 1, 14, 5], [4, 1, 14, 2]
    singles = [torch.randn(1, n, 6) for n in sizes]
    valid = torch.arange(14) < torch.tensor(sizes)[:, None]
    batch = torch.full((4, 14, 6), torch.nan)
    for row, one in zip(batch, singles):
        row[: one.shape[1]] = one[0]
    found = run(batch, torch.tensor(keep), valid)
    for i, (one, k) in enumerate(zip(singles, keep)):
        alone = run(one, k, None)
        assert found.order[i].tolist() == alone.order[0].tolist() + [-1] * (14 - k)
        assert torch.allclose(found.values[i, :k], alone.values[0], atol=1e-5)
    assert found.mask(14).sum(1).tolist() == keep and not (found.mask(14) & ~valid).any()


@pytest.mark.parametrize("criterion", CRITERIA)
def test_fewer_picks_are_the_first_of_more_and_none_comes_twice(criterion):
    x = torch.randn(3, 12, 5)
    every = CRITERIA[criterion](x, 12, None).order
    assert (every.sort(1).values == torch.arange(12)).all()
    for k in (1, 5, 11):
        assert torch.equal(CRITERIA[criterion](x, k, None).order, every[:, :k])


@pytest.mark.parametrize("criterion", CRITERIA)
def test_equal_tokens_neither_repeat_nor_crash(criterion):
    for x in (torch.ones(2, 7, 4), torch.zeros(2, 7, 4)):
        assert (CRITERIA[criterion](x, 7, None).order.sort(1).values == torch.arange(7)).all()


@pytest.mark.parametrize("criterion", CRITERIA)
def test_more_than_there_are_gives_all_and_none_gives_none(criterion):
    x = torch.randn(2, 3, 4)
    assert CRITERIA[criterion](x, 9, None).mask(3).all()
    assert CRITERIA[criterion](x, 0, None).order.shape == (2, 0)


def test_ties_go_to_the_lowest_index():
    equal = 1 - torch.eye(5)[None]
    for pick in (greedy.max_min, greedy.max_sum, greedy.k_center):
        assert pick(equal, 5).order.tolist() == [[0, 1, 2, 3, 4]]
    assert greedy.facility_location(torch.eye(5)[None], 5).order.tolist() == [[0, 1, 2, 3, 4]]
    alone = torch.tensor([[[0.0, 1.0, 0.0, 0.0]]])
    for lazy in (False, True):
        assert greedy.coverage(alone, 4, lazy=lazy).order.tolist() == [[1, 0, 2, 3]]


@pytest.mark.parametrize("seed", range(5))
def test_distances_against_a_plain_loop_and_brute_force(seed):
    x = torch.randn(1, 9, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    distance = greedy.cosine_distance(x)
    table = distance[0].tolist()
    for k in (2, 4):
        picks = greedy.max_min(distance, k)
        assert picks.order[0].tolist() == plain(table, k)
        assert greedy.max_sum(distance, k, first=torch.tensor([2])).order[0].tolist() == plain(
            table, k, 2, total=True
        )
        value = min(table[i][j] for i, j in itertools.combinations(picks.order[0].tolist(), 2))
        best = max(
            min(table[i][j] for i, j in itertools.combinations(some, 2))
            for some in itertools.combinations(range(9), k)
        )
        assert best / 4 <= value <= best + 1e-12
        assert (picks.values[0, 2:] <= picks.values[0, 1:-1] + 1e-6).all()


@pytest.mark.parametrize("seed", range(5))
def test_coverage_reaches_its_share_of_the_optimum_and_gains_fall(seed):
    gains = torch.rand(1, 7, 10, generator=torch.Generator().manual_seed(seed)) ** 4
    for k in (2, 4):
        picks = greedy.coverage(gains, k)
        worth = {
            some: gains[0][:, list(some)].amax(1).sum().item()
            for some in itertools.combinations(range(10), k)
        }
        found = worth[tuple(sorted(picks.order[0].tolist()))]
        assert found >= (1 - 1 / math.e) * max(worth.values())
        assert picks.values.sum().item() == pytest.approx(found, rel=1e-5)
        assert (picks.values[:, 1:] <= picks.values[:, :-1] + 1e-6).all()


@pytest.mark.parametrize("seed", range(3))
def test_facility_location_is_coverage_of_the_candidates_themselves(seed):
    likeness = torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(seed))
    likeness = likeness + likeness.mT
    picks = greedy.facility_location(likeness, 3).order[0].tolist()
    chosen: list[int] = []
    for _ in range(3):
        rest = [j for j in range(8) if j not in chosen]
        chosen.append(max(rest, key=lambda j: likeness[0][:, [*chosen, j]].amax(1).sum().item()))
    assert picks == chosen


@pytest.mark.parametrize("rounded", [False, True])
def test_lazy_coverage_picks_what_the_eager_form_picks(rounded):
    """With values rounded to a few levels, ties are everywhere."""
    gains = torch.rand(4, 50, 90) ** 6
    gains = (gains * 4).round() / 4 if rounded else gains
    valid = torch.rand(4, 90) > 0.2
    lazy, eager = (greedy.coverage(gains, 60, valid, lazy=flag) for flag in (True, False))
    assert torch.equal(lazy.order, eager.order)
    assert torch.allclose(lazy.values, eager.values, atol=1e-6)


def test_features_that_are_not_numbers_are_named_and_padding_is_not_looked_at():
    x, valid = torch.randn(1, 4, 3), torch.tensor([[True, True, True, False]])
    x[0, 3] = torch.nan
    assert greedy.cosine_distance(x, valid).isfinite().all()
    for bad in (torch.nan, torch.inf):
        x[0, 0, 0] = bad
        with pytest.raises(SecateurError, match="aren't finite"):
            greedy.cosine_distance(x, valid)
    with pytest.raises(SecateurError, match="isn't a number"):
        greedy.max_min(torch.full((1, 3, 3), torch.nan), 2)
    with pytest.raises(SecateurError, match="isn't a number"):
        greedy.coverage(torch.full((1, 3, 3), torch.nan), 2)


def test_the_inputs_are_left_as_they_were():
    distance = greedy.cosine_distance(torch.randn(2, 6, 3))
    before = distance.clone()
    for pick in (greedy.max_min, greedy.max_sum, greedy.k_center, greedy.coverage, greedy.facility_location):
        pick(distance, 3)
        assert torch.equal(distance, before)
