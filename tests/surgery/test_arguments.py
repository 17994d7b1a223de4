"""The search for arguments, on distances made up by hand."""

from torch import nn

from secateur.surgery.arguments import SAME, _values, fit_arguments
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
