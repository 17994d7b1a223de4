"""Small pieces of the engine, by hand."""

from types import SimpleNamespace

import torch

from secateur.tokens.call import Call
from secateur.tokens.tower import _mean_over_patches


def test_columns_that_hold_visual_tokens():
    """Row 0 has tokens in columns 1 and 2, row 1 in 0, and one of its tokens is gone."""
    call = SimpleNamespace(table=SimpleNamespace(rows=2, row=torch.tensor([0, 0, 1, 1])))
    columns = torch.tensor([[0, 1, 2, 3], [0, 1, 2, 5]])
    visual = Call.visual_columns(call, torch.tensor([1, 0]), columns, torch.tensor([1, 2, -1, 0]))
    assert visual.int().tolist() == [[1, 0, 0, 0], [0, 1, 1, 0]]
    far = Call.visual_columns(call, torch.tensor([0, 1]), columns[:, :1], torch.tensor([0, 7, -1, -1]))
    assert far.int().tolist() == [[1], [0]]
    none = SimpleNamespace(table=SimpleNamespace(rows=1, row=torch.zeros(0, dtype=torch.int64)))
    empty = torch.zeros(0, dtype=torch.int64)
    assert Call.visual_columns(none, torch.tensor([0]), columns[:1], empty).int().tolist() == [[0, 0, 0, 0]]


def test_a_unit_s_feature_is_the_mean_of_its_patches_that_are_left():
    hidden = torch.tensor([[[1.0, 2.0], [3.0, 6.0]], [[10.0, 0.0], [0.0, 4.0]]])
    slot = torch.tensor([[0, 2, 3], [1, -1, -1], [-1, 2, 1]])
    expected = [[11 / 3, 2.0], [3.0, 6.0], [6.5, 3.0]]
    torch.testing.assert_close(_mean_over_patches(hidden, slot), torch.tensor(expected))
    assert _mean_over_patches(hidden, slot[:2, :1]).tolist() == [[1, 2], [3, 6]]
