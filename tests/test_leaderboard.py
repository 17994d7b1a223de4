"""docs/leaderboard.md: written from the shipped comparisons, whose lines it shows as they are."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from secateur.taxonomy.measured import shipped

SPEC = importlib.util.spec_from_file_location(
    "leaderboard", Path(__file__).parents[1] / "benchmarks" / "leaderboard.py"
)
assert SPEC is not None and SPEC.loader is not None
board: Any = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(board)


def line(method: str, target: str, rank: int | None, **more: Any) -> dict[str, Any]:
    return {"method": method, "target": target, "rank": rank, "quality": 0.5, "error": 0.01, "cost": 0.62, "over": False, "why": None} | more  # fmt: skip


def comparison(*lines: dict[str, Any], **more: Any) -> dict[str, Any]:
    about = {
        "task": "work",
        "cost": "macs",
        "steps": 0,
        "seeds": 3,
        "test": 64,
        "metric": "accuracy",
        "sign": 1,
    }
    return about | {"percent": True, "dense": 0.9, "command": "secateur compare work", "lines": list(lines)} | more  # fmt: skip


def test_the_page_is_what_the_shipped_comparisons_say() -> None:
    assert board.page(shipped()) == board.PAGE.read_text(encoding="utf-8"), "python benchmarks/leaderboard.py"


def test_a_table_is_ordered_by_mean_rank_and_says_what_is_missing_and_what_is_over() -> None:
    text = board.section(
        comparison(
            line("a", "80%", 1, cost=0.76), line("b", "80%", 2, quality=0.25, error=None), line("c", "80%", None, why="refused: no"),
            line("b", "40%", 1, over=True), line("a", "40%", 3), line("d", "40%", 2), line("d", "80%", None, why="refused: less"), line("c", "40%", None, why="refused: no"),
        )
    )  # fmt: skip
    assert "Accuracy, 3 seeds, judged on 64; dense 90.0 %." in text
    assert [row for row in text.splitlines() if row.startswith("| `")] == [
        "| `b` | 1.5 | 25.0 % (62.0% left) | 50.0 ± 2.0 % (62.0% left) |",
        "| `a` | 2.0 | 50.0 ± 2.0 % | 50.0 ± 2.0 % |",
        "| `d` | 2.0 |  | 50.0 ± 2.0 % |",
    ]
    assert text.endswith("Without figures:\n\n- `c`: refused: no\n- `d` at 80%: refused: less")


def test_perplexities_are_no_percentages() -> None:
    one = comparison(line("a", "80%", 1, quality=12345.6, error=None, cost=0.8), percent=False, sign=-1, metric="perplexity", seeds=1, test=None, dense=24.9, steps=10)  # fmt: skip
    text = board.section(one)
    assert "Perplexity (less is better), 1 seed, judged on all test data; dense 24.90." in text
    assert "| `a` | 1.0 | 12,346 |" in text and "trained on for 10 steps" in text
