"""The worked examples and invariants of holov."""

import pytest
import torch
from token_examples import CLIP, PLAIN, SITE, circle, given, kept

from secateur.method import make_method
from secateur.testing import token_sets
from secateur.tokens.greedy import directions

HOLO = circle([0, 5, 60, 120, 0, 0, 10, 90])


SEEN = [0.090, 0.100, 0.085, 0.095, 0.120, 0.110, 0.125, 0.130]


class TestHoloV:
    def test_variance_weights_and_scores_of_the_worked_example(self):
        from secateur.methods.holov import holistic
        from secateur.tokens.select import even_runs, quotas

        runs, sizes = even_runs(torch.ones(1, 8, dtype=torch.bool), 2)
        variance = make_method("holov").variance(directions(HOLO, eps=1e-6), runs, sizes)
        expected = [0.423955, 0.402520, 0.092912, 0.212971, 0.364802, 0.364802, 0.316349, 0.007818]
        assert torch.allclose(variance, torch.tensor([expected]), atol=2e-6)
        seen = torch.tensor([SEEN]) * 1000
        scores, weights = holistic(seen, variance, runs, sizes, beta=1.0, tau=1.0)
        expected = [228.53, 231.52, 115.36, 164.59, 287.90, 277.90, 270.60, 133.60]
        assert torch.allclose(scores, torch.tensor([expected]), atol=0.006)
        assert torch.allclose(weights, torch.tensor([[0.432749, 0.567251]]), atol=1e-6)
        assert quotas(weights, 4, sizes).tolist() == [[1, 3]]
        weights = holistic(seen, variance, runs, sizes, beta=0.09, tau=1.0)[1]
        assert torch.allclose(weights, torch.tensor([[0.432749, 0.567251]]), atol=1e-6)

    @pytest.mark.parametrize("compat, expected", [("code", [1, 4, 6, 7]), ("paper", [1, 4, 5, 6])])
    def test_the_worked_example(self, compat, expected):
        assert kept("holov", given(SEEN, 4, HOLO), crops=2, compat=compat) == [expected]

    def test_the_order_of_the_code(self):
        sets = given(SEEN, 4, HOLO)
        assert kept("holov", sets, crops=2, compat="code", order="official") == [[1, 7, 6, 4]]
        valid = torch.tensor([[True] * 8, [True] * 5 + [False] * 3])
        both = token_sets(
            HOLO.expand(2, -1, -1),
            torch.tensor([4, 2]),
            valid=valid,
            attention={(SITE, "cls"): torch.tensor([SEEN, SEEN])},
            facts=CLIP,
        )
        found = kept("holov", both, crops=2, compat="code", order="official")
        assert found == [[1, 7, 6, 4], [4, 3]]  # means .0917 and .1075 of 3 and 2: quotas 0 and 2

    @pytest.mark.parametrize("compat", ["code", "paper"])
    def test_what_a_full_run_cannot_take_goes_to_the_others(self, compat):
        features = torch.ones(1, 8, 3)
        scores = [0.001] * 4 + [0.24, 0.25, 0.25, 0.25]
        assert kept("holov", given(scores, 6, features), crops=2, compat=compat) == [[0, 1, 4, 5, 6, 7]]

    def test_one_run_ranked_by_attention_is_fastervlm(self):
        scores = torch.rand(50).tolist()
        for keep in (1, 13, 49):
            sets = given(scores, keep)
            assert kept("holov", sets, crops=1, compat="code") == kept("fastervlm", sets)

    def test_quotas_follow_mean_attention_whatever_the_variance(self):
        from secateur.methods.holov import holistic
        from secateur.tokens.select import even_runs

        runs, sizes = even_runs(torch.ones(1, 576, dtype=torch.bool), 16)
        seen, x = torch.rand(1, 576) * 1000, directions(torch.randn(1, 576, 8))
        variance = make_method("holov").variance(x, runs, sizes)
        mean = seen.reshape(1, 16, 36).mean(2)
        for beta in (0.09, 1.0, 3.0):
            weights = holistic(seen, variance, runs, sizes, beta, 1.0)[1]
            assert torch.allclose(weights, mean / mean.sum(), atol=1e-5)

    @pytest.mark.parametrize("n, crops", [(10, 3), (7, 7), (5, 16), (1, 16), (23, 22)])
    def test_uneven_runs_single_tokens_and_more_runs_than_tokens(self, n, crops):
        for keep in range(1, n + 1):
            found = kept("holov", given(torch.rand(n).tolist(), keep), crops=crops)[0]
            assert len(found) == keep

    def test_a_run_of_one_token_is_scored_like_the_others(self):
        """Without the factor it would starve: here its attention is the highest of all."""
        scores = [0.5, 0.1, 0.1, 0.1]
        assert 0 in kept("holov", given(scores, 1, torch.randn(1, 4, 3)), crops=4)[0]

    def test_the_scale_of_attention_does_not_matter(self):
        for compat in ("code", "paper"):
            base, scaled = (
                kept("holov", given([a * c for a in SEEN], 4, HOLO), crops=2, compat=compat)
                for c in (1, 0.37)
            )
            assert base == scaled

    def test_every_run_with_a_whole_share_keeps_a_token(self):
        scores = torch.rand(576) + 0.5
        found = torch.tensor(kept("holov", given(scores.tolist(), 64))[0]) // 36
        assert set(found.tolist()) == set(range(16))

    def test_the_number_of_runs_without_cls_follows_qwen(self):
        """int(1.778 * 100 / 20) = 8 runs of 12 or 13 tokens; all attention in one run of 12 fills it, no more."""
        scores = torch.zeros(100)
        scores[88:] = 1.0
        sets = given(
            scores.tolist(), 20, site="encoder:-1", rows="all", facts=PLAIN, features=torch.ones(1, 100, 2)
        )
        assert kept("holov", sets)[0][-12:] == list(range(88, 100))
