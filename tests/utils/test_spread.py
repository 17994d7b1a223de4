"""Ratios of timings; the numbers are by hand."""

import json
import sys
from types import SimpleNamespace

import pytest

from secateur.measure.load import Others, crowded
from secateur.utils.spread import Speed, decimals, quartiles


def test_quartiles_are_numpys():
    np = pytest.importorskip("numpy")
    for values in ([3.0], [1.0, 2.0], [5.0, 1.0, 4.0, 2.0, 9.0, 3.5]):
        assert quartiles(values) == pytest.approx(tuple(np.quantile(values, (0.25, 0.5, 0.75))))


def test_digits_end_where_the_spread_begins():
    assert [decimals(*span) for span in ((1.61, 1.79), (1.68, 1.71), (431, 470), (1, 1))] == [1, 2, -1, 2]


def test_pairs_that_drift_together_say_the_same_and_medians_do_not():
    """A machine that slows down by a factor of three while both run: every pair says 2."""
    drift = [1.0, 1.2, 1.5, 2.0, 2.6, 3.0]
    speed = Speed.of([2 * slow for slow in drift], drift)
    assert str(speed) == "2.00x (2.00 to 2.00)" and speed.differs
    assert Speed.read(json.loads(json.dumps(speed.as_dict()))) == speed


@pytest.mark.parametrize(
    ("ratios", "expected"),
    [
        ([1.1] * 4, False),  # too few
        ([1.1] * 5, True),
        ([1.1] * 7 + [0.9], True),  # seven of eight
        ([1.1] * 6 + [0.9] * 2, False),
        ([0.9] * 9, True),
        ([1.004] * 9, False),  # too small to matter
    ],
)
def test_a_difference_is_one_that_nearly_all_pairs_show(ratios, expected):
    speed = Speed.of(ratios, [1.0] * len(ratios))
    assert speed.differs == expected
    assert str(speed).startswith("not distinguishable") != expected


def test_one_pair_says_nothing():
    assert str(Speed.of([2.0], [1.0])) == "not known from one pair"


def test_work_of_others_is_counted_and_ones_own_is_not(monkeypatch):
    load = sys.modules[Others.__module__]
    ticks, own, clock = iter([10.0, 14.0]), iter([1.0, 3.0]), iter([0.0, 2.0])
    monkeypatch.setattr(load, "_busy", lambda: next(ticks))
    monkeypatch.setattr(load, "_own", lambda: next(own))
    monkeypatch.setattr(load, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    assert Others().used() == pytest.approx(1.0)  # two processors busy, one of them ours
    assert crowded(1.0, 2, 2) and not crowded(1.0, 2, 1) and not crowded(3.0, 64, 64)
