"""Rows followed from the owner of a list of experts to the experts, by hand."""

import torch
from torch import nn

from secateur.stats.routed import _experts, _first, _followed, _marks


def test_the_hidden_states_are_the_first_floats_with_a_width():
    ids, flat, hidden = torch.zeros(2, 3, dtype=torch.long), torch.zeros(4), torch.zeros(2, 4)
    assert _first((None, ids, flat, hidden), {"x": torch.ones(1, 1)}) is hidden
    assert _first((ids,), {"mask": None, "x": hidden}) is hidden
    assert _first((ids, flat, 3), {}) is None


def test_marks_are_equal_for_rows_that_are_equal_bit_by_bit():
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        x = torch.tensor([[1.0, 2.0], [2.0, 1.0], [1.0, 2.0], [0.0, 0.0], [-0.0, 0.0]], dtype=dtype)
        a, b, again, zero, minus = _marks(x).tolist()
        assert a == again and len({a, b, zero, minus}) == 4
    long = torch.randn(1025, 3)
    assert torch.equal(_marks(long)[1024:], _marks(long[1024:]))


def test_rows_are_in_view_or_padding_and_of_equal_ones_as_many_as_are_in_view():
    shown, hidden = torch.tensor([1, 2, 5]), torch.tensor([3, 5, 5])
    found = _followed(torch.tensor([3, 1, 5, 2, 5]), shown, hidden)
    assert found.tolist() == [False, True, True, True, False]
    assert _followed(torch.tensor([1, 9]), shown, hidden) is None
    assert _followed(torch.tensor([5]), shown, hidden).tolist() == [True]


def test_an_expert_is_the_member_of_the_list_that_a_module_lies_in():
    member = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    model = nn.ModuleDict({"moe": nn.Module(), "other": nn.Linear(2, 2)})
    owner = model["moe"]
    owner.experts, owner.nested = (
        nn.ModuleList([member]),
        nn.ModuleList([nn.ModuleDict({"a": nn.Linear(2, 2)})]),
    )
    deep = owner.nested[0]["a"]
    found = _experts(model, [member[0], member, deep, model["other"]])
    assert found == {member[0]: (member, owner), member: (member, owner), deep: (deep, owner)}
