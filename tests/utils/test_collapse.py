"""What counts as a collapse; the numbers are by hand."""

import math

import pytest

from secateur.utils.collapse import collapses


def broke(kind, was, now, **about):
    task = {"acc": 1.0} if kind == "accuracy" else 1.0
    sides = [{kind: {"t": value if kind != "accuracy" else {"acc": value}}} for value in (was, now)]
    assert collapses({kind: {"t": task}}, {kind: {"t": task}}) == []
    return len(collapses({**sides[0], **{key: {"t": value} for key, value in about.items()}}, sides[1])) == 1


@pytest.mark.parametrize(
    ("was", "now", "about", "expected"),
    [
        (0.95, 0.225, {"chance": 0.1}, True),
        (0.70, 0.651, {"chance": 0.5}, False),  # 0.049 of 0.2 above chance
        (0.70, 0.649, {"chance": 0.5}, True),  # 0.051 of 0.2
        (0.70, 0.649, {}, False),  # of 0.7, where chance isn't known
        (0.70, 0.60, {"chance": 0.5, "questions": 50}, False),  # two standard errors are 0.19
        (0.70, 0.60, {"chance": 0.5, "questions": 2000}, True),  # 0.03
        (0.48, 0.20, {"chance": 0.5}, False),  # there was nothing to lose
        (0.95, math.nan, {"chance": 0.1}, True),
        (0.5, 0.9, {}, False),
    ],
)
def test_accuracy(was, now, about, expected):
    assert broke("accuracy", was, now, **about) == expected


def test_perplexity_and_psnr():
    assert broke("perplexity", 20.0, 40.1) and not broke("perplexity", 20.0, 40.0)
    assert broke("perplexity", 20.0, None) and broke("perplexity", 20.0, math.nan)
    assert not broke("perplexity", None, None)
    assert broke("psnr", 37.5, 34.4) and not broke("psnr", 37.5, 34.6)


def test_mean_intersection_over_union_has_no_chance():
    before = {"accuracy": {"camvid": {"miou": 0.55, "acc": 0.86}}, "chance": {"camvid": 1 / 11}}
    [found] = collapses(before, {"accuracy": {"camvid": {"miou": 0.40, "acc": 0.80}}})
    assert (found.metric, found.why) == ("miou", "27 % of it is gone")
