"""What published systems claim, beside what was measured here: docs/truth.md, written from `truth.json`.

    python benchmarks/truth.py             # writes docs/truth.md
    python benchmarks/truth.py --check     # only says whether it is as it would be written

A row of `truth.json` is one claim tried in one place: a method of the registry, the claim, the command that measured it, and the
figures. What it says of the claim is worked out from these (`verdict`), never typed.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field

from secateur.errors import SecateurError, require
from secateur.taxonomy.axes import RECORDS
from secateur.taxonomy.catalogue import catalogue
from secateur.utils.files import atomic_write_text
from secateur.utils.schema import Entry, parse, read_object

ROOT = Path(__file__).parents[1]
DATA, PAGE = ROOT / "benchmarks" / "truth.json", ROOT / "docs" / "truth.md"
FIX = "mend the row in benchmarks/truth.json"
KINDS = {
    "prune": "Weights and units, nothing trained",
    "train-prune": "Pruning that trains",
    "tokens": "Visual tokens",
    "attach": "Attention that reads less",
    "saliency": "Maps",
    "prompts": "Prompts",
    "train sod": "Objects that stand out",
}
"""Verb of a method -> heading of its table."""
FIRST = """
Of each published method that stands in the library, a claim of its paper, in a sentence of ours, and what was measured here. The
verdicts are worked out from the figures:
""".strip()
CARE = """
*Here* means small networks, short trainings and few seeds: a claim that fails on a model of a million parameters may hold on one of
seven thousand million, and one that holds here isn't shown there. With three seeds two standard errors are a weak test (p = 0.18 in
a t-test), and of so many rows some fall on either side by luck. ± is two standard errors; differences are in pairs where both have
the same seeds. Where a paper left something open, the page of the method says what was reconstructed.
""".strip()
FORM = """
A row of `benchmarks/truth.json`: `system`, `claim`, `task`, `budget`, `figure`, `better` (high or low), `ours`, `rivals` by name,
`margin` (how far ahead the claim is; negative: how far behind it allows), `factor` (a share of the rival's figure that is enough),
`over` (what the spread is over, seeds unless said), `command`, `note`. A figure is a number that no seed changes, a list with one
number a seed, or `mean`, `error` (one standard error) and `count`. Where nothing can be measured, `because` says why. A row of a
published system that isn't in the library yet waits until it is. Then `python benchmarks/truth.py`.
""".strip()
REPRODUCED, REFUTED, OPEN, UNTESTED = "reproduced", "refuted here", "not shown", "not testable here"


class Spread(Entry):
    """A figure whose single values aren't known: mean, its standard error, and over how many it is taken."""

    mean: float
    error: float = Field(ge=0)
    count: int = Field(ge=2)


Figure = float | list[float] | Spread
"""A number that no seed changes; the values of the seeds, in their order; or what is known of them."""


class Row(Entry):
    """One claim of a paper, tried in one place.

    The claim holds where ours - factor * rival >= margin for every rival (the other way round where less is better).
    """

    system: str
    claim: str = Field(min_length=20)
    task: str = ""
    budget: str = ""
    figure: str = ""
    better: Literal["high", "low"] = "high"
    ours: Figure | None = None
    called: str = ""
    rivals: dict[str, Figure] = Field(default_factory=dict)
    factor: float = Field(default=1.0, gt=0)
    margin: float = 0.0
    over: str = "seeds"
    command: str = ""
    note: str = ""
    because: str = ""


class Table(Entry):
    format: Literal["secateur-truth"]
    version: Literal[1]
    rows: list[Row]


@dataclass(frozen=True)
class Gap:
    """How far a row is beyond what its claim asks for, against one rival; two standard errors of it, NaN where they aren't known."""

    value: float
    error: float

    @property
    def sign(self) -> int:
        """1 or -1 where the gap is more than its error, else 0. A gap as large as its error is within it."""
        beyond = abs(self.value) > self.error and not math.isclose(abs(self.value), self.error, rel_tol=1e-9)
        return int(math.copysign(beyond, self.value))


def read(file: Path = DATA) -> list[Row]:
    """The rows of the file. Raises `SecateurError` where it can't be read or a row isn't whole."""
    rows = parse(Table, read_object(file, FIX), str(file), FIX).rows
    for row in rows:
        measured = row.ours is not None and row.rivals and row.task and row.figure and row.command
        if bool(measured) == bool(row.because) or (row.because and row.ours is not None):
            raise SecateurError(
                "it needs either figures (ours, rivals, task, figure, command) or a reason why there are none",
                where=f"{file.name}: {row.system}",
                fix=FIX,
            )
        for value in (row.ours, *row.rivals.values()):
            if isinstance(value, list) and not value:
                raise SecateurError("a list of figures is empty", where=f"{file.name}: {row.system}", fix=FIX)
    return rows


def mean(value: Figure) -> float:
    if isinstance(value, Spread):
        return value.mean
    return statistics.mean(value) if isinstance(value, list) else value


def error(value: Figure) -> float:
    """Standard error of the mean: 0 for what no seed changes, NaN for a single seed."""
    if isinstance(value, Spread):
        return value.error
    if isinstance(value, list):
        return statistics.stdev(value) / len(value) ** 0.5 if len(value) > 1 else math.nan
    return 0.0


def count(row: Row) -> int:
    """Over how many seeds (or what `over` says) the row's own figure is known."""
    if isinstance(row.ours, Spread):
        return row.ours.count
    return len(row.ours) if isinstance(row.ours, list) else 1


def gap(row: Row, rival: Figure) -> Gap:
    """Ours against a rival: in pairs where both have a value for each seed, else from both errors.

    >>> gap(Row(system="x", claim="x is ahead of y by a bit", ours=[3.0, 5.0], rivals={}), [1.0, 2.0])
    Gap(value=2.5, error=1.0)
    """
    assert row.ours is not None
    sign = 1 if row.better == "high" else -1
    if isinstance(row.ours, list) and isinstance(rival, list) and len(row.ours) == len(rival) > 1:
        pairs: Figure = [a - row.factor * b for a, b in zip(row.ours, rival)]
        return Gap(round(sign * mean(pairs) - row.margin, 9), 2 * error(pairs))
    value = sign * (mean(row.ours) - row.factor * mean(rival)) - row.margin
    both = math.hypot(error(row.ours), row.factor * error(rival))
    once = isinstance(row.ours, float) and isinstance(rival, float)  # nothing says how far they may be off
    return Gap(round(value, 9), math.nan if once else 2 * both)


def verdict(row: Row) -> str:
    """What the figures say of the claim.

    reproduced: beyond every rival by more than two standard errors of the difference. refuted here: short of one rival by more
    than that. not shown: neither, or one seed. not testable here: no figure can tell, and the row says why.
    """
    if row.because:
        return UNTESTED
    signs = [gap(row, rival).sign for rival in row.rivals.values()]
    return REFUTED if -1 in signs else REPRODUCED if all(s == 1 for s in signs) else OPEN


def leaning(row: Row) -> str:
    """Of a claim that isn't shown: why, and where its figures point."""
    gaps = [gap(row, rival) for rival in row.rivals.values()]
    why = "one seed" if any(math.isnan(g.error) for g in gaps) else "within the error"
    if all(g.value > 0 for g in gaps):
        return f"{why}; points its way"
    return f"{why}; points against it" if any(g.value < 0 for g in gaps) else why


def number(value: float) -> str:
    """
    >>> [number(v) for v in (0.0132, 4.456, 41.3, 112900.0)]
    ['0.01', '4.46', '41.3', '112,900']
    """
    size = abs(value)
    return f"{value:,.0f}" if size >= 1000 else f"{value:.1f}" if size >= 10 else f"{value:.2f}"


def shown(value: Figure) -> str:
    """The mean, with two standard errors where they are known."""
    one = error(value)
    return number(mean(value)) + (f" ± {number(2 * one)}" if one > 0 else "")


def name(row: Row) -> str:
    return row.called or row.system


def times(row: Row) -> str:
    return f"{row.factor:g} x " if row.factor != 1 else ""


def known(found: Gap) -> str:
    return "" if math.isnan(found.error) else f" ± {number(found.error)}"


def figures(row: Row) -> str:
    """What was measured, in one cell: ours, and each rival with the difference to it."""
    assert row.ours is not None
    parts = [f"{name(row)} {shown(row.ours)}"]
    for rival, value in row.rivals.items():
        plain = gap(row.model_copy(update={"margin": 0.0}), value)
        lead = "ahead" if plain.value >= 0 else "behind"
        by = f"{lead} by {number(abs(plain.value))}{known(plain)}"
        parts.append(f"{times(row)}{rival} {shown(value)} ({by})")
    return f"{row.figure}, {'more' if row.better == 'high' else 'less'} is better: " + "; ".join(parts)


def asked(row: Row) -> str:
    """What the claim asks for beside being ahead."""
    if row.margin > 0:
        return f"Held to: ahead by {number(row.margin)}."
    return f"Held to: behind by no more than {number(-row.margin)}." if row.margin < 0 else ""


def seeds(row: Row) -> str:
    return f"{count(row):,} {row.over}" if count(row) > 1 else "1"


def missing(rows: list[Row]) -> list[str]:
    """Published methods of the registry (those whose record has a year) without a row."""
    known = {row.system for row in rows}
    published = [n for n, method in catalogue()["methods"].items() if method["info"].get("year")]
    return sorted(set(published) - known)


def strange(rows: list[Row]) -> list[str]:
    """Systems of rows that neither the registry nor the taxonomy's records of published systems have."""
    return sorted({row.system for row in rows} - set(catalogue()["methods"]) - {r.spec for r in RECORDS})


def cell(text: str) -> str:
    return " ".join(text.split()).replace("|", r"\|")


def table(rows: list[Row]) -> list[str]:
    head = ("system", "paper", "claim", "tried on", "seeds", "figures", "verdict", "command")
    lines = ["| " + " | ".join(head) + " |", "| " + " | ".join("---" for _ in head) + " |"]
    for row in rows:
        arxiv = catalogue()["methods"][row.system]["info"].get("arxiv")
        paper = f"[{arxiv}](https://arxiv.org/abs/{arxiv})" if arxiv else "-"
        found = verdict(row)
        said = f"{found}, because {row.because}" if row.because else f"**{found}**"
        if found == OPEN:
            said += f": {leaning(row)}"
        cells = (
            f"[{row.system}](methods/{row.system}.md)",
            paper,
            f"{row.claim} {asked(row)}",
            ", ".join(filter(None, (row.task, row.budget))) or "-",
            "-" if row.because else seeds(row),
            "-" if row.because else f"{figures(row)}. {row.note}",
            said,
            f"`{row.command}`" if row.command else "-",
        )
        lines.append("| " + " | ".join(map(cell, cells)) + " |")
    return [*lines, ""]


def sentence(row: Row) -> str:
    """What goes against a claim, as a line of a list: how far it is from which rivals."""
    assert row.ours is not None
    sure = verdict(row) == REFUTED
    parts = []
    for rival, value in row.rivals.items():
        found = gap(row, value)
        if found.sign < 0 or (not sure and found.value < 0):
            plain = gap(row.model_copy(update={"margin": 0.0}), value)
            by = f"{number(abs(plain.value))}{known(plain)} ({number(mean(row.ours))} against {number(mean(value))})"
            parts.append(f"{'behind' if plain.value < 0 else 'ahead of'} {times(row)}{rival} by {by}")
    place = ", ".join(filter(None, (row.task, row.budget)))
    about = "" if sure else f"; {leaning(row).split(';')[0]}"
    said = f"Here {name(row)} is {' and '.join(parts)}: {row.figure}; {place}{about}."
    return cell(f"- [{row.system}](methods/{row.system}.md): *{row.claim}* {asked(row)} {said} {row.note}")


def page(rows: list[Row]) -> str:
    """docs/truth.md. Raises `SecateurError` for a system that nobody knows, or a published method without a row."""
    if unknown := strange(rows):
        raise SecateurError(
            f"nothing is known of {', '.join(unknown)}", where="benchmarks/truth.json", fix=FIX
        )
    if left := missing(rows):
        raise SecateurError(
            f"nothing is said of {', '.join(left)}",
            where="benchmarks/truth.json",
            fix="add a row with the claim and the figures, or with `because`: why it can't be tried here",
        )
    rows = sorted((r for r in rows if r.system in catalogue()["methods"]), key=lambda r: r.system)
    found = Counter(verdict(row) for row in rows)
    refuted = [row for row in rows if verdict(row) == REFUTED]
    against = [row for row in rows if verdict(row) == OPEN and "against" in leaning(row)]
    systems = {row.system for row in rows}
    lines = [
        "# Does it hold here?",
        "",
        "<!-- written by `python benchmarks/truth.py`; edit benchmarks/truth.json instead -->",
        "",
        FIRST,
        "",
        "| verdict | rows | what it means |",
        "| --- | --- | --- |",
        f"| {REPRODUCED} | {found[REPRODUCED]} | as far as claimed beyond every rival, by more than two standard errors of the difference |",
        f"| {REFUTED} | {found[REFUTED]} | short of that against a rival by more than two standard errors |",
        f"| {OPEN} | {found[OPEN]} | neither: within the error, or measured once |",
        f"| {UNTESTED} | {found[UNTESTED]} | no figure here can tell, with the reason: what there is to try it on, or that it is still to be measured |",
        "",
        f"{len(rows)} rows about {len(systems)} methods.\n{CARE}",
        "",
        "## What goes against the papers",
        "",
        *(map(sentence, refuted) if refuted else ["Nothing."]),
        "",
        "Figures that point against a paper, but don't show it:",
        "",
        *(map(sentence, against) if against else ["None."]),
        "",
    ]
    verbs = {catalogue()["methods"][row.system]["verb"] for row in rows}
    require(
        verbs <= KINDS.keys(),
        f"no heading for {', '.join(sorted(verbs - KINDS.keys()))}",
        where="KINDS",
        fix="add one",
    )
    for verb, title in KINDS.items():
        mine = [row for row in rows if catalogue()["methods"][row.system]["verb"] == verb]
        lines += [f"## {title}", "", *table(mine)] if mine else []
    lines += [
        "## Adding a row",
        "",
        FORM,
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail where the page is another")
    args = parser.parse_args()
    try:
        text = page(read())
    except SecateurError as problem:
        sys.exit(f"secateur: {problem}")
    if not args.check:
        atomic_write_text(PAGE, text)
    elif not PAGE.exists() or PAGE.read_text(encoding="utf-8") != text:
        sys.exit("docs/truth.md isn't what benchmarks/truth.json says: python benchmarks/truth.py")


if __name__ == "__main__":
    main()
