"""The worked examples and invariants of fopru."""

import pytest
import torch
from token_examples import CLIP, SITE, given, given_grid, kept

from secateur.method import make_method
from secateur.testing import token_sets


class TestFoPru:
    S = torch.tensor([[0.4, 0.3, 0.2, 0.1], [0.1, 0.6, 0.2, 0.1], [0.3, 0.4, 0.2, 0.1], [0.2, 0.5, 0.2, 0.1]])

    def test_the_axis_of_larger_variance(self):
        from secateur.methods.fopru import significance

        received, row = self.S.mean(0, keepdim=True), self.S.mean(1)[None]
        assert torch.allclose(received, torch.tensor([[0.25, 0.45, 0.20, 0.10]]))
        assert received.var().item() == pytest.approx(0.0216667, abs=1e-6)
        everything = torch.ones(1, 4, dtype=torch.bool)
        assert torch.equal(significance(received, row, everything), received)
        assert torch.equal(significance(row, received, everything), received)
        assert torch.equal(significance(received, received + 1, everything), received)

    def test_rank_and_row_of_the_worked_example(self):
        sets = given([0.25, 0.45, 0.20, 0.10], 2, rows="visual")
        assert kept("fopru", sets) == [[0, 1]]
        assert kept("fopru", sets, strategy="row") == [[0, 1]]

    def test_row_against_rank_on_three_by_three(self):
        scores = [0.30, 0.01, 0.02, 0.10, 0.12, 0.11, 0.05, 0.20, 0.02]
        assert kept("fopru", given(scores, 3, rows="visual")) == [[0, 4, 7]]
        for keep in (6, 7, 8):
            assert kept("fopru", given(scores, keep, rows="visual"), strategy="row") == [[0, 1, 2, 3, 4, 5]]
        assert len(kept("fopru", given(scores, 2, rows="visual"), strategy="row")[0]) == 3

    def test_logits_of_the_engines_own_example(self):
        heads = torch.tensor([[[-2.0, 5, 5], [-7, 3, 8], [-7, -7, -8]], [[6, 9, 8], [3, 10, 7], [2, 9, -9]]])
        q = heads[None] * 3**0.5
        k = torch.eye(3).expand(1, 2, 3, 3)
        sets = token_sets(torch.randn(1, 3, 4), 2, queries={SITE: q}, keys={SITE: k}, facts=CLIP, grid=(1, 3))
        received, row = make_method("fopru", scores="logits").candidates(sets)
        assert torch.allclose(row, torch.tensor([[5.166667, 4, -3.333333]]), atol=1e-5)
        assert torch.allclose(received, torch.tensor([[-0.833333, 4.833333, 1.833333]]), atol=1e-5)
        assert row.var().item() == pytest.approx(21.2315, abs=1e-3)
        assert received.var().item() == pytest.approx(8.0370, abs=1e-3)
        assert kept("fopru", sets, scores="logits") == [[0, 1]]

    def test_attention_given_leaves_out_what_goes_to_cls(self):
        q, k, cls = torch.randn(1, 2, 9, 4) * 3, torch.randn(1, 2, 9, 4), torch.randn(1, 2, 4) * 3
        full = (q @ torch.cat([cls[:, :, None], k], 2).mT / 2).softmax(-1)[..., 1:].mean(1)
        sets = token_sets(
            torch.randn(1, 9, 4),
            3,
            attention={(SITE, "visual"): full.mean(1)},
            queries={SITE: q},
            keys={SITE: k, (SITE, "cls"): cls},
            facts=CLIP,
        )
        received, row = make_method("fopru").candidates(sets)
        assert torch.allclose(row, full.mean(2), atol=1e-6) and torch.equal(received, full.mean(1))

    def test_rank_holds_at_least_the_significance_of_rows(self):
        for _ in range(5):
            scores = torch.rand(36)
            rank, row = (
                kept("fopru", given(scores.tolist(), 12, rows="visual"), strategy=s)[0]
                for s in ("rank", "row")
            )
            assert len(rank) == len(row) == 12 and scores[rank].sum() >= scores[row].sum()

    def test_permuting_rows_of_the_grid_permutes_the_rows_that_stay(self):
        scores, order = torch.rand(5, 4), torch.randperm(5)
        first = {i // 4 for i in kept("fopru", given_grid(scores), strategy="row")[0]}
        moved = {int(order[i // 4]) for i in kept("fopru", given_grid(scores[order]), strategy="row")[0]}
        assert moved == first and len(first) == 2

    def test_a_map_without_favourites_still_keeps_as_many(self):
        assert kept("fopru", given([0.25] * 4, 3, rows="visual")) == [[0, 1, 2]]
