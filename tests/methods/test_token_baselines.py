"""The worked examples and invariants of token baselines."""

import pytest
import torch
from token_examples import kept

from secateur.method import make_method
from secateur.testing import token_sets


class TestBaselines:
    def test_random_draws_image_after_image_so_a_batch_is_its_images_in_turn(self):
        valid = torch.arange(30) < torch.tensor([30, 7, 19])[:, None]
        batch = token_sets(torch.randn(3, 30, 2), 5, valid=valid, seed=4)
        together = kept("random-tokens", batch)
        one = token_sets(torch.randn(1, 30, 2), 5, seed=4)
        singles = kept("random-tokens", one)
        for n in (7, 19):
            sets = token_sets(torch.randn(1, n, 2), 5)
            sets.generator = one.generator
            singles += kept("random-tokens", sets)
        assert together == singles and len({tuple(row) for row in together}) == 3

    def test_random_is_uniform(self):
        sets = token_sets(torch.randn(4000, 8, 1), 2)
        share = make_method("random-tokens").select(sets).float().mean(0)
        assert (share - 0.25).abs().max() < 0.03

    @pytest.mark.parametrize("height, width", [(24, 24), (3, 7), (1, 9), (16, 5)])
    def test_the_uniform_grid_keeps_exactly_the_target_and_covers_the_image(self, height, width):
        n = height * width
        for keep in {1, 2, 3, n // 4 or 1, n // 2, n - 1, n}:
            sets = token_sets(torch.randn(1, n, 2), keep, grid=(height, width))
            found = kept("uniform-grid", sets)[0]
            assert len(found) == len(set(found)) == keep
            if keep >= 4:
                centre = torch.tensor([[i // width, i % width] for i in found]).float().mean(0)
                middle = torch.tensor([(height - 1) / 2, (width - 1) / 2])
                assert ((centre - middle).abs() <= torch.tensor([height, width]) / 6 + 0.5).all()

    def test_a_quarter_of_an_even_grid_is_every_second_row_and_column(self):
        sets = token_sets(torch.randn(1, 576, 2), 144)
        assert kept("uniform-grid", sets)[0] == [r * 24 + c for r in range(1, 24, 2) for c in range(1, 24, 2)]

    def test_downsampling_to_a_quarter_is_two_by_two_average_pooling(self):
        x = torch.randn(2, 576, 3)
        found = make_method("downsample").select(token_sets(x, 144))
        pooled = torch.nn.functional.avg_pool2d(x.mT.reshape(2, 3, 24, 24), 2).flatten(2).mT
        assert torch.allclose(found.features, pooled, atol=1e-6)
        assert found.index[0, :3].tolist() == [0, 2, 4]

    @pytest.mark.parametrize(
        "height, width, keep", [(24, 24, 64), (27, 27, 182), (5, 3, 4), (1, 8, 3), (4, 4, 1)]
    )
    def test_downsampling_never_exceeds_the_target_and_averages_everything(self, height, width, keep):
        x = torch.randn(1, height * width, 2)
        found = make_method("downsample").select(token_sets(x, keep, grid=(height, width)))
        index = found.index[0].tolist()
        assert keep / 2 < len(index) <= keep and index == sorted(set(index))
        ones = make_method("downsample").select(token_sets(torch.ones_like(x), keep, grid=(height, width)))
        assert torch.allclose(ones.features, torch.ones_like(ones.features))

    def test_ragged_sets_are_pooled_each_by_itself(self):
        x = torch.randn(2, 16, 3)
        valid = torch.arange(16) < torch.tensor([16, 6])[:, None]
        row = torch.arange(16).expand(2, 16) // torch.tensor([[4], [3]])
        column = torch.arange(16).expand(2, 16) % torch.tensor([[4], [3]])
        sets = token_sets(
            x,
            torch.tensor([4, 2]),
            valid=valid,
            grid=torch.tensor([[4, 4], [2, 3]]),
            grid_row=row,
            grid_col=column,
        )
        found = make_method("downsample").select(sets)
        assert found.index[1].tolist()[2:] == [-1, -1]
        alone = token_sets(x[1:, :6], 2, grid=(2, 3))
        other = make_method("downsample").select(alone)
        assert torch.equal(found.index[1, :2], other.index[0])
        assert torch.allclose(found.features[1, :2], other.features[0])
