"""Means, errors, ranks, fronts and tests of a comparison, against numbers worked out by hand."""

import math

import pytest
from scipy import stats

from secateur.comparison import Setup, summary
from secateur.comparison.summary import Line, front, mean_ranks, metric_of
from secateur.errors import SecateurError


def rows(method, target, values, cost=0.5, **more):
    return [
        {"method": method, "target": target, "seed": seed, "state": "done", "quality": value, "metric": "accuracy", "sign": 1, "params": cost, "macs": 1.0, **more}
        for seed, value in enumerate(values)
    ]  # fmt: skip


FOUND = [
    *rows("dense", "100%", [0.9, 0.9, 0.9], 1.0),
    *rows("random", "50%", [0.1, 0.2, 0.3]),
    *rows("random-structured", "50%", [0.05, 0.15, 0.1]),
    *rows("magnitude", "50%", [0.5, 0.5, 0.5]),
    *rows("wanda", "50%", [0.5, 0.7, 0.6]),
    *rows("obspa", "50%", [0.57, 0.61, 0.65], 0.4),
    {"method": "flap", "target": "50%", "seed": 0, "state": "refused", "why": "nothing can be cut"},
]


def lines(found=FOUND, **more):
    return {(line.method, line.target): line for line in summary(Setup("digits"), found, **more)}


def test_means_standard_errors_and_ranks():
    found = lines()
    wanda = found["wanda", "50%"]
    assert wanda.quality == pytest.approx(0.6) and wanda.error == pytest.approx(0.1 / math.sqrt(3))
    ranked = {line.rank: line.method for line in found.values() if line.rank}
    assert (
        {ranked[1], ranked[2]} == {"wanda", "obspa"}
        and ranked[3] == "magnitude"
        and ranked[5] == "random-structured"
    )
    assert found["flap", "50%"].why == "refused: nothing can be cut" and found["flap", "50%"].rank is None
    assert found["dense", "100%"].rank is None


def test_each_is_tested_against_chance_of_its_own_kind_and_the_baseline():
    found = lines()
    gap, p = found["wanda", "50%"].against["chance"]  # single weights: random
    assert gap == pytest.approx(0.4) and p == pytest.approx(
        stats.ttest_rel([0.5, 0.7, 0.6], [0.1, 0.2, 0.3]).pvalue
    )
    gap, _ = found["obspa", "50%"].against["chance"]  # units: random-structured
    assert gap == pytest.approx(0.51)
    gap, p = found["wanda", "50%"].against["magnitude"]
    assert gap == pytest.approx(0.1) and p == pytest.approx(stats.ttest_1samp([0.0, 0.2, 0.1], 0).pvalue)
    assert (
        "magnitude" not in found["magnitude", "50%"].against
        and "chance" not in found["random", "50%"].against
    )
    assert found["dense", "100%"].against == {} and found["flap", "50%"].against == {}
    with_obspa = lines(baseline="obspa")["wanda", "50%"].against
    assert with_obspa["obspa"][0] == pytest.approx(-0.01) and "magnitude" not in with_obspa


def test_an_unknown_baseline_is_refused_with_those_there_are():
    with pytest.raises(SecateurError, match="'owl' has no rows.*dense, random"):
        lines(baseline="owl")


def test_the_front_holds_what_no_other_beats():
    points = [Line(m, "50%", quality=q, cost=c) for m, q, c in [("a", 0.9, 0.5), ("b", 0.8, 0.4), ("c", 0.8, 0.45), ("d", 0.7, 0.4), ("e", 0.9, 0.6)]]  # fmt: skip
    assert [line.method for line in front(points)] == ["a", "b"]
    assert [line.method for line in front(points, sign=-1)] == ["d"]
    assert {key for key, line in lines().items() if line.front} == {("dense", "100%"), ("obspa", "50%")}


def test_less_is_better_where_the_metric_says_so():
    found = [{**row, "metric": "perplexity", "sign": -1} for row in FOUND]
    assert metric_of(found) == ("perplexity", -1)
    by_name = lines(found)
    assert by_name["random-structured", "50%"].rank == 1
    assert by_name["wanda", "50%"].against["chance"][0] == pytest.approx(-0.4)


def test_what_is_over_its_budget_is_marked():
    found = lines([*FOUND, *rows("ria", "50%", [0.9], 0.51)])
    assert found["ria", "50%"].over and not found["wanda", "50%"].over and not found["dense", "100%"].over
    assert math.isnan(found["ria", "50%"].error)


def test_mean_ranks_over_targets():
    found = [*FOUND, *rows("wanda", "40%", [0.3]), *rows("random", "40%", [0.4])]
    ranks = {name: (rank, count) for name, rank, count in mean_ranks(summary(Setup("digits"), found))}
    assert ranks["random"] == (2.5, 2) and ranks["wanda"][1] == 2
