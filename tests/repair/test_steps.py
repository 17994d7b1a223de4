"""The optimiser on a block: it comes to a known answer, keeps zeros, and leaves a block that fails as it was."""

import pytest
import torch
from torch import nn

from secateur import SecateurError
from secateur.repair.steps import fit_block, relative_error, step_size


def cases(block, wanted, x):
    return lambda number: (((x[number],), {}), [wanted(x[number])], None)


def test_the_error_is_relative_to_each_token_and_padding_does_not_count():
    """Tokens (1, 0) and (20, 0) off by (0, 1) and (0, 10): 1 and 1/4."""
    wanted = torch.tensor([[1.0, 0.0], [20.0, 0.0]])
    found = wanted + torch.tensor([[0.0, 1.0], [0.0, 10.0]])
    assert relative_error([found], [wanted]).item() == pytest.approx((1 + 0.25) / 2)
    assert relative_error([found], [wanted], torch.tensor([False, True])).item() == pytest.approx(0.25)


def test_a_masked_layer_comes_to_the_answer_that_is_known():
    """y = (x1 + x3) (1, .., 1) with x3 = x2: without the third input the second must do its work."""
    torch.manual_seed(0)
    x = torch.rand(4, 64, 3)
    x[..., 2] = x[..., 1]
    block = nn.Linear(3, 8, bias=False)
    mask = torch.tensor([[True, True, False]]).expand(8, 3)
    with torch.no_grad():
        block.weight.copy_(torch.tensor([[1.0, 0.2, 0.0]]).expand(8, 3))
    first, last = fit_block(
        block,
        cases(block, lambda v: (v[..., :1] + v[..., 2:]).expand(-1, 8), x),
        4,
        [block.weight],
        {block.weight: mask},
        passes=60,
        rate=0.1,
    )
    assert last < 0.01 * first
    assert torch.allclose(block.weight.detach(), torch.tensor([1.0, 1.0, 0.0]), atol=0.02)
    assert not block.weight[:, 2].any() and block.weight.requires_grad and block.weight.grad is None


def test_a_block_whose_error_is_no_number_is_left_as_it_was():
    block = nn.Linear(2, 2)
    before = block.weight.detach().clone()
    x = torch.randn(2, 4, 2)
    x[1, 0] = torch.nan
    with pytest.raises(SecateurError, match="layers.3: its error isn't finite"):
        fit_block(
            block,
            cases(block, lambda v: v, x),
            2,
            [*block.parameters()],
            {},
            passes=2,
            rate=0.1,
            name="layers.3",
        )
    assert torch.equal(block.weight, before)


def test_steps_see_about_512_tokens():
    assert step_size(torch.zeros(8, 128, dtype=torch.int64)) == 4
    assert step_size(torch.zeros(8, 2048, dtype=torch.int64)) == 1
    assert step_size(torch.zeros(8, 3, 4, 4)) == 4
    assert step_size([{"input_ids": torch.zeros(1, 4)}]) is None


def test_a_bias_that_is_zero_goes_no_further_than_the_weights():
    """Outputs of 0.02: a bias that went 0.07 at a step would drown them, and nothing would be kept."""
    torch.manual_seed(0)
    block, x = nn.Linear(4, 4), torch.randn(40, 16, 4)
    nn.init.normal_(block.weight, std=0.02)
    nn.init.zeros_(block.bias)
    weight = block.weight.detach() * 1.2
    before, after = fit_block(
        block, cases(block, lambda v: v @ weight.T, x), 40, [*block.parameters()], {}, passes=2, rate=0.07
    )
    assert before == pytest.approx(0.0278, rel=0.01) and after < 0.1 * before
