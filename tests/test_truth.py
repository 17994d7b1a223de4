"""docs/truth.md: as its data say, complete, and with verdicts that follow from the figures."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from secateur.errors import SecateurError
from secateur.taxonomy import catalogue

ROOT = Path(__file__).parents[1]
SPEC = importlib.util.spec_from_file_location("truth", ROOT / "benchmarks" / "truth.py")
assert SPEC is not None and SPEC.loader is not None
truth: Any = importlib.util.module_from_spec(SPEC)
sys.modules["truth"] = truth
SPEC.loader.exec_module(truth)


def row(ours: Any, *rivals: Any, **fields: Any) -> Any:
    named = {f"rival {i}": value for i, value in enumerate(rivals)}
    about = {"system": "wanda", "claim": "it is ahead of the others", "task": "digits", "figure": "accuracy"}
    return truth.Row.model_validate({**about, "command": "secateur", "ours": ours, "rivals": named, **fields})


def spread(mean: float, error: float, count: int = 3) -> dict[str, float]:
    return {"mean": mean, "error": error, "count": count}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        # pairs: differences 1, 2, 3, so 2 with a standard error of 1 / sqrt(3): 2 > 1.155
        (row([11.0, 52.0, 93.0], [10.0, 50.0, 90.0]), "reproduced"),
        (row([11.0, 52.0, 93.0], [10.0, 50.0, 90.0], better="low"), "refuted here"),
        # the same values of other seeds aren't pairs: their spread hides the difference
        (row(spread(52, 23.7), [10.0, 50.0, 90.0]), "not shown"),
        # ahead by 2, but 1 was claimed: 1 < 1.155
        (row([11.0, 52.0, 93.0], [10.0, 50.0, 90.0], margin=1.0), "not shown"),
        (row([11.0, 52.0, 93.0], [10.0, 50.0, 90.0], margin=4.0), "refuted here"),
        # behind by 2, which a claim of no more than 4 allows, and one of no more than 2 does not show
        (row([10.0, 50.0, 90.0], [11.0, 52.0, 93.0], margin=-4.0), "reproduced"),
        (row([10.0, 50.0, 90.0], [11.0, 52.0, 93.0], margin=-2.0), "not shown"),
        # errors of 0.3 and 0.4 make 0.5: twice that is 1
        (row(spread(10, 0.3), spread(8.9, 0.4)), "reproduced"),
        (row(spread(10, 0.3), spread(9.1, 0.4)), "not shown"),
        (row(spread(10, 0.3), spread(11.1, 0.4)), "refuted here"),
        # a difference of exactly two standard errors (1, 1 and 4: 2 with an error of 1) is within them
        (row([1.0, 2.0, 7.0], [0.0, 1.0, 3.0]), "not shown"),
        # against what no seed changes
        (row([1.0, 2.0, 3.0], 0.8), "reproduced"),
        (row([1.0, 2.0, 3.0], 0.9), "not shown"),
        # 95 % of 100 is enough for 96, and isn't enough for 94
        (row(spread(96, 0.1), 100.0, factor=0.95), "reproduced"),
        (row(spread(94, 0.1), 100.0, factor=0.95), "refuted here"),
        (row(spread(1.9, 0.01), spread(1.0, 0.0), factor=2.0, better="low"), "reproduced"),
        # one seed shows nothing, however large the difference
        (row([40.4], 423.1, better="low"), "not shown"),
        (row(40.4, 423.1, better="low"), "not shown"),
        (row([40.4], [36.9, 37.0, 37.1], better="low"), "not shown"),
        # ahead of all, or it isn't; behind one is enough
        (row([5.0, 5.1, 5.2], [1.0, 1.1, 1.2], [5.0, 5.2, 5.1]), "not shown"),
        (row([5.0, 5.1, 5.2], [1.0, 1.1, 1.2], [9.0, 9.2, 9.1]), "refuted here"),
    ],
)
def test_verdicts_follow_from_the_figures(given: Any, expected: str) -> None:
    assert truth.verdict(given) == expected


def test_what_is_not_shown_says_why_and_where_it_points() -> None:
    assert truth.leaning(row([39.5], [36.9], [45.4], better="low")) == "one seed; points against it"
    assert truth.leaning(row([1.0, 2.0, 3.0], 1.5)) == "within the error; points its way"
    assert (
        truth.leaning(row([0.1, 0.4, 0.7], [0.2, 0.3, 0.7])) == "within the error"
    )  # a rounding error is no lead


def test_a_cell_shows_pairs_factor_and_two_standard_errors() -> None:
    pairs = truth.figures(row([11.0, 52.0, 93.0], [10.0, 50.0, 90.0], called="it"))
    assert pairs == "accuracy, more is better: it 52.0 ± 47.3; rival 0 50.0 ± 46.2 (ahead by 2.00 ± 1.15)"
    once = truth.figures(row([40.4], 423.1, better="low"))
    assert once == "accuracy, less is better: wanda 40.4; rival 0 423.1 (ahead by 382.7)"
    assert "0.95 x rival 0 100.0 (behind by 1.00 ± 0.20)" in truth.figures(
        row(spread(94, 0.1), 100.0, factor=0.95)
    )


def test_the_page_is_what_the_data_say() -> None:
    assert truth.page(truth.read()) == truth.PAGE.read_text(encoding="utf-8"), "python benchmarks/truth.py"


def test_a_published_method_without_a_row_is_named() -> None:
    rows = truth.read()
    with pytest.raises(SecateurError, match="nothing is said of fastv, wanda"):
        truth.page([row for row in rows if row.system not in ("fastv", "wanda")])
    with pytest.raises(SecateurError, match="nothing is known of wandah"):
        truth.page([*rows, row([1.0], 2.0, system="wandah")])
    controls = {
        "random",
        "random-structured",
        "random-tokens",
        "uniform-grid",
        "downsample",
        "salient-tokens",
    }
    assert {row.system for row in rows} >= set(catalogue.catalogue()["methods"]) - controls
    waiting = row([1.0], 2.0, system="survey-taxonomy")  # a published system that isn't in the library
    assert truth.page([*rows, waiting]) == truth.page(rows)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"because": "there is nothing to try it on"}, "either figures"),
        ({"rivals": {}}, "either figures"),
        ({"command": ""}, "either figures"),
        ({"ours": []}, "empty"),
        ({"verdict": "reproduced"}, "verdict"),
        ({"better": "up"}, "better"),
        ({"ours": [1.0, "2"]}, "ours"),
        ({"rivals": {"dense": {"mean": 1.0, "error": -1.0, "count": 3}}}, "rivals"),
    ],
)
def test_a_row_that_is_not_whole_is_refused(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    good = row([1.0, 2.0], 0.5).model_dump()
    file = tmp_path / "truth.json"
    file.write_text(json.dumps({"format": "secateur-truth", "version": 1, "rows": [good]}))
    assert len(truth.read(file)) == 1
    file.write_text(json.dumps({"format": "secateur-truth", "version": 1, "rows": [{**good, **change}]}))
    with pytest.raises(SecateurError, match=said):
        truth.read(file)


def test_commands_are_there() -> None:
    for entry in truth.read():
        if entry.command:
            found = re.match(r"(python (benchmarks/\w+\.py)|secateur [a-z])", entry.command)
            assert found, entry.command
            assert not found[2] or (ROOT / found[2]).is_file(), entry.command


def test_what_goes_against_a_paper_stands_on_top() -> None:
    rows = truth.read()
    top, tables = truth.page(rows).split("## Weights and units", 1)
    for verdict in ("refuted here", "reproduced"):
        assert tables.count(f"**{verdict}**") == sum(truth.verdict(r) == verdict for r in rows)
    refuted = [entry for entry in rows if truth.verdict(entry) == "refuted here"]
    assert refuted and all(truth.sentence(entry) in top for entry in refuted)


def test_a_surprise_names_only_the_rivals_it_is_behind() -> None:
    said = truth.sentence(row(spread(5, 0.1), spread(1, 0.1), spread(9, 0.1), called="it", budget="half"))
    assert said.endswith(
        "Here it is behind rival 1 by 4.00 ± 0.28 (5.00 against 9.00): accuracy; digits, half."
    )
    short = truth.sentence(row(spread(5, 0.1), spread(4, 0.1), margin=3.0))
    assert (
        "Held to: ahead by 3.00. Here wanda is ahead of rival 0 by 1.00 ± 0.28 (5.00 against 4.00)" in short
    )
