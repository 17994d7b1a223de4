"""The search for arguments, on distances made up by hand."""

from secateur.surgery.arguments import SAME, fit_arguments


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
