"""The search for arguments, on distances made up by hand and on a small network."""

import functools

import pytest
import torch
from torch import nn

from secateur.surgery.arguments import (
    FAR,
    SAME,
    _alike,
    _pairs,
    _values,
    constructor_arguments,
    fit_arguments,
    shape_distance,
)
from secateur.surgery.changes import _renumber


def toggle(name):
    def turn(values):
        values[name] = 1 - values[name]

    return turn


KNOBS = [toggle(name) for name in "abc"]
START = {"a": 0, "b": 0, "c": 0}


def test_two_at_a_time_where_no_single_one_helps_and_then_one_again():
    """a and b help only together, c only after both; what was turned is turned back by a second turn."""
    tried = []

    def distance(values):
        tried.append(dict(values))
        if values["a"] != values["b"]:
            return 9, 0
        return (2 - values["a"] - values["c"], 0) if values["a"] else (3 + values["c"], 0)

    values, score = fit_arguments(START, KNOBS, distance)
    assert values == {"a": 1, "b": 1, "c": 1} and score == SAME == (0, 0)
    assert START == {"a": 0, "b": 0, "c": 0} and len(tried) == 1 + 3 + 3 + 3


def test_never_three_at_a_time():
    tried = []

    def distance(values):
        tried.append(values)
        return (0, 0) if sum(values.values()) == 3 else (5, 0)

    assert fit_arguments(START, KNOBS, distance) == (START, (5, 0)) and len(tried) == 1 + 3 + 3


def test_what_an_argument_may_have_become():
    """12 channels became 8: a count of 6 is half of them, one of 4 a third; 5 blocks became 3."""
    changed, blocks = {(12, 8), (12, 9)}, {(5, 3), (6, 2)}
    assert _values(6, changed, changed, blocks) == [2, 4]
    assert _values(4, changed, changed, blocks) == [3] and _values(5, changed, changed, blocks) == [3]
    assert _values(12, changed, changed, blocks) == [8, 9] and _values(1, changed, changed, blocks) == []
    assert _values(7, changed, changed, blocks) == []
    assert _values(1.5, {(12, 8), (8, 8)}, changed, blocks) == [1.0]
    assert _values(0.0, changed, changed, blocks) == []


def test_only_numbered_children_are_numbered_afresh():
    numbered = nn.ModuleList(nn.Linear(1, n) for n in (1, 2, 3))
    assert _renumber(numbered, ["0", "2"]) == {"0": "0", "2": "1"}
    assert [layer.out_features for layer in numbered] == [1, 3]
    named = nn.ModuleDict({"0": nn.Linear(1, 1), "a": nn.Linear(1, 2), "2": nn.Linear(1, 3)})
    assert _renumber(named, ["a", "2"]) == {"a": "a", "2": "2"} and list(named) == ["a", "2"]


class Net(nn.Module):
    """`depth` blocks on a width, an inner size by a ratio, one list of sizes, and a size that follows unless it is given."""

    def __init__(self, width=8, depth=3, ratio=2.0, sizes=(4, 6), hidden=None, eps=1e-5):
        super().__init__()
        if width % 2:
            raise ValueError("odd")
        self.width, self.hidden = width, hidden or 3 * width
        self.blocks = nn.ModuleList(nn.Linear(width, int(width * ratio)) for _ in range(depth))
        self.tail = nn.ModuleList(nn.Linear(width, size) for size in sizes)
        self.out = nn.Linear(self.hidden, 2)


@pytest.mark.parametrize(
    "arguments",
    [{}, {"width": 4}, {"depth": 1}, {"width": 6, "depth": 2, "hidden": 18}, {"ratio": 1.5}, {"ratio": 0.5},
     {"sizes": (4, 3)}, {"sizes": (2, 3)}, {"hidden": 10}],
)  # fmt: skip
def test_arguments_of_a_cut_model_are_found(arguments):
    found = constructor_arguments(Net(**arguments), Net)
    assert found is not None and shape_distance(Net(**arguments), Net(**found)) == SAME
    assert all(found.get(name) == value for name, value in arguments.items() if name != "hidden")
    assert not set(found) - set(arguments) - {"hidden"}


def test_arguments_are_not_made_up_for_what_no_arguments_build():
    unlike, few = Net(), Net(depth=2)
    unlike.blocks[1] = nn.Linear(8, 12)
    few.blocks.append(nn.Linear(8, 12))
    assert constructor_arguments(unlike, Net) is None and constructor_arguments(few, Net) is None
    odd = Net()
    odd.blocks = nn.ModuleList(nn.Linear(7, 14) for _ in range(3))
    assert constructor_arguments(odd, Net) is None
    assert constructor_arguments(Net(), lambda **_: nn.Linear(1, 0, nowhere=1)) is None


def test_the_class_is_itself_again_and_only_its_own_arguments_are_noted():
    class Wrapped(Net):
        def __init__(self):
            super().__init__(width=6)

    before = Net.__init__
    assert constructor_arguments(Net(depth=2), functools.partial(Net, 8)) == {"depth": 2}
    assert Net.__init__ is before
    assert constructor_arguments(Wrapped(), lambda **_: Wrapped()) == {}


def test_how_far_two_models_are_from_each_other():
    """(tensors, attributes): weight and bias of one block; then those of a block that is missing, its two sizes."""
    whole, other = Net(), Net()
    other.blocks[0] = nn.Linear(8, 12)
    assert shape_distance(whole, whole) == (0, 0) and shape_distance(whole, None) == FAR
    assert shape_distance(whole, other) == shape_distance(other, whole) == (2, 1)
    assert shape_distance(whole, Net(depth=2)) == shape_distance(Net(depth=2), whole) == (2, 2)
    other.width = 9.5  # no whole number any more: one attribute less
    assert shape_distance(whole, other) == (2, 2)
    whole.register_buffer("steps", torch.zeros(3))
    assert shape_distance(whole, whole) == (0, 0) and shape_distance(Net(), whole) == (1, 0)


def test_old_and_new_sizes():
    dense, cut = Net(), Net(width=6, depth=2)
    sizes, blocks = _pairs(cut, dense)
    assert blocks == {(3, 2)} and {pair for pair in sizes if pair[0] != pair[1]} == {
        (8, 6),
        (16, 12),
        (24, 18),
    }
    assert (4, 4) in sizes and (2, 2) in sizes
    assert _pairs(dense, cut)[1] == set()
    cut.hidden, cut.out = 24, nn.Conv1d(18, 2, 1)  # weights of another rank: their axes say nothing
    assert (24, 18) not in _pairs(cut, dense)[0]


def test_twins_of_different_sizes_are_no_model_of_arguments():
    dense, unlike = Net(), Net()
    assert _alike(dense, dense) and _alike(Net(width=6), dense) and _alike(Net(depth=1), dense)
    unlike.blocks[1] = nn.Linear(8, 12)
    assert not _alike(unlike, dense) and _alike(dense, unlike)
    unlike.blocks[1], unlike.more = nn.Linear(8, 16), nn.Linear(1, 1)
    assert not _alike(unlike, dense) and _alike(dense, unlike)
