"""Counts, quotas, adaptive budgets, schedules and grids: hand-computed and published numbers."""

import math

import pytest
import torch

from secateur import SecateurError
from secateur.tokens import counts, grid, select


def rows(mask):
    return [row.nonzero()[:, 0].tolist() for row in mask]


def places(height, width):
    return torch.arange(height * width)[None]


class TestCounts:
    def test_published_budgets_of_a_share(self):
        """Spec fastervlm: R = 25, 50, 75, 90, 95 % of 576."""
        found = [int(counts.counts(torch.tensor([576]), share)) for share in (0.75, 0.5, 0.25, 0.1, 0.05)]
        assert found == [432, 288, 144, 58, 29]

    def test_half_goes_to_even_and_one_token_always_stays(self):
        total = torch.tensor([5, 7, 45, 1, 0])
        assert counts.counts(total, 0.5).tolist() == [2, 4, 22, 1, 0]
        assert counts.counts(total, 0.01).tolist() == [1, 1, 1, 1, 0]
        assert counts.counts(total, 1.0).tolist() == total.tolist()

    def test_divprune_budgets(self):
        found = counts.counts(torch.tensor([576, 2880, 2340, 1152]), 0.098)
        assert found.tolist() == [56, 282, 229, 113]

    def test_a_count_is_an_images_and_is_shared_by_its_crops(self):
        crops = torch.tensor([576, 576, 576, 576, 576, 100])
        image = torch.tensor([0, 0, 0, 0, 0, 7])
        found = counts.counts(crops, 64, image)
        assert found.tolist() == [13, 13, 13, 13, 12, 64]
        assert counts.counts(crops, 640, image).tolist() == [128] * 5 + [100]
        assert counts.counts(torch.tensor([300, 100]), 20, torch.tensor([3, 3])).tolist() == [15, 5]
        assert counts.counts(torch.tensor([4, 4, 4]), 2, torch.tensor([0, 0, 0])).tolist() == [1, 1, 1]

    @pytest.mark.parametrize("target", [0, -3, 0.0, 1.5, -0.1])
    def test_nonsense(self, target):
        with pytest.raises(SecateurError, match="no number of tokens"):
            counts.counts(torch.tensor([9]), target)


class TestTop:
    def test_ties_go_to_the_lowest_index(self):
        scores = torch.tensor([[1.0, 2, 2, 2, 0], [7, 7, 7, 7, 7]])
        assert rows(select.top_per_row(scores, torch.tensor([2, 3]))) == [[1, 2], [0, 1, 2]]

    def test_padding_and_what_is_no_candidate_never_stay(self):
        scores = torch.tensor([[9.0, 1, 2, torch.nan]])
        valid = torch.tensor([[False, True, True, False]])
        assert rows(select.top_per_row(scores, 1, valid)) == [[2]]
        assert rows(select.top_per_row(scores, 4, valid)) == [[1, 2]]
        low = torch.full((1, 4), -torch.inf)
        assert rows(select.top_per_row(low, 1, valid)) == [[1]]

    @pytest.mark.parametrize("dtype", [torch.int64, torch.float16, torch.bfloat16, torch.float64, torch.bool])
    def test_any_type_of_score(self, dtype):
        assert rows(select.top_per_row(torch.tensor([[0, 1, 0, 1]]).to(dtype), 2)) == [[1, 3]]

    def test_against_a_plain_sort(self):
        scores = torch.randint(0, 6, (40, 25)).float()
        keep = torch.randint(0, 26, (40,))
        for row, k, found in zip(scores.tolist(), keep.tolist(), rows(select.top_per_row(scores, keep))):
            assert found == sorted(sorted(range(25), key=lambda i: (-row[i], i))[:k])

    def test_nan_is_named(self):
        with pytest.raises(SecateurError, match="isn't a number"):
            select.top_per_row(torch.tensor([[1.0, torch.nan]]), 1)

    def test_groups_against_a_plain_sort(self):
        scores, groups = torch.randint(0, 5, (20, 30)).float(), torch.randint(0, 4, (20, 30))
        valid, quota = torch.rand(20, 30) > 0.2, torch.randint(0, 9, (20, 4))
        found = rows(select.top_per_group(scores, groups, quota, valid))
        for i in range(20):
            expected = []
            for g in range(4):
                members = [j for j in range(30) if valid[i, j] and groups[i, j] == g]
                expected += sorted(members, key=lambda j: (-scores[i, j], j))[: quota[i, g]]
            assert found[i] == sorted(expected)


class TestQuotas:
    def divide(self, weights, k, caps):
        return select.quotas(torch.tensor([weights]), k, torch.tensor([caps]))[0].tolist()

    def test_published_examples(self):
        """Spec holov (a)."""
        assert self.divide([0.432749, 0.567251], 4, [4, 4]) == [1, 3]
        assert self.divide([0.00402, 0.99598], 6, [4, 4]) == [2, 4]

    def test_what_caps_cut_off_goes_on_by_weight_and_room(self):
        """Floors 1, 2, 7; the cap of 2 frees 5: gains .1 x 9 and .2 x 8 share them as floor 1.8, floor 3.2, the rest one to the larger weight."""
        assert self.divide([0.1, 0.2, 0.7], 10, [10, 10, 2]) == [2, 6, 2]

    def test_rest_by_weight_ties_to_the_lowest(self):
        assert self.divide([0.25] * 4, 6, [9] * 4) == [2, 2, 1, 1]

    def test_no_weight_at_all_is_shared_by_room(self):
        """One each, then four more by room 1 and 7: floor 0.5, floor 3.5, the rest to the first."""
        assert self.divide([0.0, 0.0], 6, [2, 8]) == [2, 4]
        assert self.divide([0.0, 0.0, 1.0], 6, [4, 4, 2]) == [2, 2, 2]

    def test_a_group_that_is_not_there_gets_nothing(self):
        assert self.divide([0.9, 0.1, 0.0], 3, [0, 5, 5])[0] == 0

    def test_more_than_fits_fills_everything(self):
        assert self.divide([0.5, 0.5], 99, [3, 4]) == [3, 4]

    def test_budgets_are_met_whatever_the_weights(self):
        weights = torch.rand(200, 7) ** 8
        weights = weights / weights.sum(1, keepdim=True)
        caps, keep = torch.randint(0, 20, (200, 7)), torch.randint(0, 90, (200,))
        found = select.quotas(weights, keep, caps)
        assert (found >= 0).all() and (found <= caps).all()
        assert torch.equal(found.sum(1), torch.minimum(keep, caps.sum(1)))
        roomy = select.quotas(weights, 50, torch.full((200, 7), 50))
        assert ((roomy - weights * 50).abs() < 1 + 1e-4).all()

    def test_nan_is_named(self):
        with pytest.raises(SecateurError, match="isn't a number"):
            self.divide([0.5, math.nan], 3, [4, 4])

    @pytest.mark.parametrize(
        "n, parts, sizes", [(576, 16, [36] * 16), (10, 4, [3, 3, 2, 2]), (3, 5, [1, 1, 1])]
    )
    def test_runs(self, n, parts, sizes):
        runs, found = select.even_runs(torch.ones(1, n, dtype=torch.bool), parts)
        assert found.tolist() == [sizes]
        assert runs[0].tolist() == [i for i, size in enumerate(sizes) for _ in range(size)]

    def test_runs_of_ragged_sets(self):
        valid = torch.arange(6) < torch.tensor([6, 3])[:, None]
        runs, sizes = select.even_runs(valid, torch.tensor([2, 3]))
        assert runs[0].tolist() == [0, 0, 0, 1, 1, 1] and runs[1, :3].tolist() == [0, 1, 2]
        assert sizes.tolist() == [[3, 3, 0], [1, 1, 1]]


Z = [0.0116, 0.0132, 0.2000, 0.0140, 0.0101, 0.0109, 0.5000, 0.0147, 0.0157, 0.0174, 0.0182, 0.0189]


class TestOutliers:
    """Spec recoverable-compression (a): numbers of scikit-learn's LocalOutlierFactor."""

    def test_published_factors(self):
        expected = [1.153, 0.882, 73.716, 0.980, 1.153, 1.153, 114.546, 1.035, 0.888, 1.170, 1.170, 1.170]
        found = counts.outlier_factor(torch.tensor([Z], dtype=torch.float64), 3)[0]
        assert torch.allclose(found, torch.tensor(expected, dtype=torch.float64), atol=6e-4)

    @pytest.mark.parametrize("neighbours, expected", [(3, [2, 6]), (10, [6]), (20, []), (11, [])])
    def test_the_number_of_neighbours_matters(self, neighbours, expected):
        assert rows(counts.outliers(torch.tensor([Z], dtype=torch.float64), neighbours)) == [expected]

    def test_factor_of_the_one_outlier_with_ten_neighbours(self):
        found = counts.outlier_factor(torch.tensor([Z], dtype=torch.float64), 10)[0, 6]
        assert found.item() == pytest.approx(2.509, abs=6e-4)

    def test_shifting_and_scaling_change_nothing_and_padding_is_not_seen(self):
        z = torch.rand(1, 40, dtype=torch.float64) ** 6
        base = counts.outliers(z, 10)
        assert torch.equal(counts.outliers(z * 7 + 3, 10), base)
        padded = torch.cat([z, torch.full((1, 9), torch.nan, dtype=torch.float64)], 1)
        found = counts.outliers(padded, 10, torch.arange(49)[None] < 40)
        assert torch.equal(found[:, :40], base) and not found[:, 40:].any()

    def test_one_number_and_equal_numbers_are_no_outliers(self):
        assert not counts.outliers(torch.tensor([[3.0]]), 20).any()
        assert not counts.outliers(torch.full((1, 30), 0.5), 20).any()


class TestEntropy:
    def test_the_published_ratio_and_what_leaves(self):
        """Spec flowcut (a): N = 8, T = 2; before rounding 0.44066, 0.98533, 1.39347 at 20, 4, 2 layers to go."""
        attention = torch.tensor([[0.40, 0.20, 0.10, 0.05, 0.05, 0.05, 0.05, 0.05]])
        assert counts.entropy_ratio(attention).item() == pytest.approx(0.819485, abs=1e-6)
        share = counts.entropy_share(attention).item()
        assert [6 / left**0.5 * share for left in (20, 4, 2)] == pytest.approx(
            [0.44066, 0.98533, 1.39347], abs=1e-5
        )

    def test_even_and_single(self):
        even, one = torch.full((1, 9), 0.3), torch.eye(9)[:1]
        assert counts.entropy_share(even).item() == pytest.approx(0, abs=1e-12)
        assert counts.entropy_share(one).item() == 1
        padded = torch.cat([even, torch.rand(1, 4)], 1)
        found = counts.entropy_ratio(padded, torch.arange(13)[None] < 9)
        assert found.item() == pytest.approx(1, abs=1e-12)


class TestSchedules:
    @pytest.mark.parametrize(
        "target, expected",
        [
            (32, [48, 35.2, 25.8, 19.0]),
            (64, [96, 70.4, 51.7, 37.9]),
            (128, [192, 140.9, 103.3, 75.8]),
            (192, [288, 211.3, 155.0, 113.7]),
        ],
    )
    def test_geometric_stages(self, target, expected):
        """Spec visiondrop: 1.5 T, falling by rho = 0.73362."""
        assert [target * share for share in counts.geometric()] == pytest.approx(expected, abs=0.05)

    def test_geometric_has_mean_one(self):
        for stages, first in ((4, 3.0), (3, 1.0), (5, 0.5)):
            assert sum(counts.geometric(stages, first)) == pytest.approx(stages)
        with pytest.raises(SecateurError, match="can't start"):
            counts.geometric(4, 4.0)

    def test_means_over_layers(self):
        """Spec visiondrop and vflowopt: 32 tokens, and the three shipped rows."""
        assert counts.mean_over_layers([48, 35, 26, 19], [8, 8, 8, 8]) == 32
        shipped = [
            ((0.7233201, 0.7487476, 0.487), 0.500773),
            ((0.2651026, 0.9833433, 0.8773258), 0.250685),
            ((0.1166153, 1.0, 0.6011), 0.100002),
        ]
        for (a, b, c), mean in shipped:
            assert counts.mean_over_layers([a, a * b, a * b * c], [9, 9, 10]) == pytest.approx(mean, abs=1e-6)
            assert counts.last_ratio(mean, [a, b], [9, 9, 10]) == pytest.approx(c, abs=1e-4)

    def test_the_last_ratio_stays_a_ratio(self):
        assert counts.last_ratio(0.9, [0.5, 0.5], [9, 9, 10]) == 1
        assert counts.last_ratio(0.1, [0.9, 0.9], [9, 9, 10]) == 0


class TestGrids:
    def test_the_published_stride(self):
        """Spec feather (a): g = 4, s = 3; and 81 of 27 x 27."""
        at = places(4, 4)
        assert rows(grid.strided_grid(at // 4, at % 4, 3)) == [[0, 3, 12, 15]]
        at = places(27, 27)
        assert grid.strided_grid(at // 27, at % 27, 3).sum() == 81
        assert not grid.strided_grid(torch.tensor([[-1, 0]]), torch.tensor([[-1, -1]]), 1).any()

    @pytest.mark.parametrize("height, width", [(24, 24), (5, 3), (1, 7), (7, 1)])
    def test_even_grids_have_exactly_the_count(self, height, width):
        for keep in range(1, height * width + 1):
            found = grid.even_grid(height, width, keep).tolist()
            assert found == sorted(set(found)) and len(found) == keep and found[-1] < height * width

    def test_no_two_tokens_of_an_even_grid_are_crowded(self):
        """64 of 24 x 24 stand 3 apart."""
        found = grid.even_grid(24, 24, 64)
        apart = (found[:, None] // 24 - found // 24).abs() + (found[:, None] % 24 - found % 24).abs()
        assert (apart + 99 * torch.eye(64)).min() == 3

    def test_neighbours_wrap_or_stop_at_the_edge(self):
        """Spec hiprune (a): 4 x 4, token 3: {0, 2, 3, 4, 7} as released, {2, 3, 7} geometrically."""
        mask, four = torch.arange(16)[None] == 3, torch.tensor([4])
        assert rows(grid.neighbours(mask, places(4, 4), four, four, "wrap")) == [[0, 2, 3, 4, 7]]
        assert rows(grid.neighbours(mask, places(4, 4), four, four, "clip")) == [[2, 3, 7]]

    def test_the_middle_the_last_row_and_other_shapes(self):
        three, five = torch.tensor([3]), torch.tensor([5])
        for token, wrap, clip in (
            (7, [2, 6, 7, 8, 12], [2, 6, 7, 8, 12]),
            (14, [9, 13, 14], [9, 13, 14]),
            (10, [5, 9, 10, 11, 14], [5, 10, 11]),
            (0, [0, 1, 5], [0, 1, 5]),
        ):
            mask = places(3, 5) == token
            assert rows(grid.neighbours(mask, places(3, 5), five, three, "wrap")) == [wrap]
            assert rows(grid.neighbours(mask, places(3, 5), five, three, "clip")) == [clip]

    def test_tokens_that_are_gone_are_passed_over_in_batches(self):
        at = torch.tensor([[0, 1, 2, 3], [0, 3, 4, -1]])
        size = torch.tensor([2, 3])
        mask = torch.tensor([[True, False, False, False], [True, False, False, False]])
        assert rows(grid.neighbours(mask, at, size, size)) == [[0, 1, 2], [0, 1]]

    def test_an_unknown_rule(self):
        with pytest.raises(SecateurError, match="clip or wrap"):
            grid.neighbours(
                torch.ones(1, 1).bool(), places(1, 1), torch.ones(1).long(), torch.ones(1).long(), "x"
            )

    def test_rectangles(self):
        at = places(3, 5)
        valid = torch.ones_like(at, dtype=torch.bool)
        assert grid.rectangle(at // 5 + 2, at % 5 + 1, valid) == [(3, 5)]
        valid[0, -1] = False
        assert grid.rectangle(at // 5, at % 5, valid) == [(1, 14)]
        assert grid.rectangle(at // 5, at % 5, torch.arange(15)[None] < 10) == [(2, 5)]
        assert grid.rectangle(at % 3, at // 3, torch.arange(15)[None] < 15) == [(1, 15)]
