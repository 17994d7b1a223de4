"""The worked examples and invariants of divprune."""

import pytest
import torch
from token_examples import circle, kept

from secateur.method import make_method
from secateur.testing import token_sets
from secateur.tokens.greedy import cosine_distance


class TestDivPrune:
    def test_the_worked_example_whatever_the_norms(self):
        for norms in (None, [1.0, 2, 1, 3, 1, 0.5]):
            sets = token_sets(circle([0, 10, 20, 90, 100, 200], norms), 4)
            assert kept("divprune", sets) == [[0, 2, 4, 5]]

    def test_exact_duplicates_are_never_chosen_twice(self):
        sets = token_sets(torch.ones(2, 9, 5), torch.tensor([4, 9]))
        assert [len(row) for row in kept("divprune", sets)] == [4, 9]

    def test_permuting_the_tokens_permutes_the_choice(self):
        x, order = torch.randn(1, 40, 8), torch.randperm(40)
        first = kept("divprune", token_sets(x, 11))[0]
        moved = kept("divprune", token_sets(x[:, order], 11))[0]
        assert sorted(int(order[i]) for i in moved) == first

    def test_published_cost_at_the_published_share(self):
        """Eleven prompts, 56 of 576 tokens left: mean 3.22796 and 0.51225 TFLOPs, mean ratio 15.6303 %."""
        from secateur.tokens.cost import layer_flops
        from secateur.tokens.counts import counts

        left = int(counts(torch.tensor([576]), 0.098))
        texts = (15, 15, 23, 83, 25, 113, 15, 39, 21, 91, 57)
        dense, pruned = (
            [32 * layer_flops(n + t, 4096, 11008, gated=False) / 1e12 for t in texts] for n in (576, left)
        )
        assert sum(dense) / 11 == pytest.approx(3.22796, abs=1e-5)
        assert sum(pruned) / 11 == pytest.approx(0.51225, abs=1e-5)
        assert sum(b / a for a, b in zip(dense, pruned)) / 11 == pytest.approx(0.156303, abs=1e-6)

    def test_newline_tokens_compete_and_an_image_is_one_set(self):
        cls = type(make_method("divprune"))
        assert cls.newlines == "compete" and cls.scope == "image"

    def test_its_smallest_distance_beats_random_choices(self):
        x = torch.randn(1, 60, 4)
        distance = cosine_distance(x)[0] + 9 * torch.eye(60)
        ours = kept("divprune", token_sets(x, 12))[0]
        least = distance[ours][:, ours].min()
        for seed in range(20):
            other = torch.randperm(60, generator=torch.Generator().manual_seed(seed))[:12]
            assert distance[other][:, other].min() < least
