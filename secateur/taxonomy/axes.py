"""The survey's taxonomy as data: a record for every method, filters over records, and advice on choosing.

Spec: survey-taxonomy, after Cheng et al. 2023, arXiv 2308.06767. The axes and letters are the survey's; token, attention,
window and saliency members extend them.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import textwrap
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any

from secateur.errors import SecateurError, choose
from secateur.taxonomy import records as _tables
from secateur.taxonomy.words import ALSO, ranked

AXES: dict[str, tuple[str, ...]] = {
    "objects": ("W", "N", "F", "C", "H", "L", "B", "E", "X", "T", "A", "Win", "P", "S", "tool"),
    "granularity": ("unstr", "N:M", "struct", "token", "block", "none"),
    "speedup": ("univ", "spec", "mixed", "none"),
    "when": ("PBT", "PDT", "PAT", "PAT-PT", "RT", "none"),
    "criteria": (
        "MAG",
        "NORM",
        "SAL",
        "LOSS",
        "REG",
        "META",
        "GNN",
        "RL",
        "ATT",
        "DIV",
        "COV",
        "TXT",
        "ENT",
        "VAL",
        "ACT",
        "CONF",
        "CLU",
        "UNI",
        "GATE",
        "none",
    ),
    "order": ("shot", "iter", "none"),
    "data": ("free", "input", "calib", "data", "none"),
    "start": ("init", "early", "pre", "scratch"),
    "recovery": ("none", "tune", "train", "LoRA", "module"),
    "task": ("orig", "transf"),
    "decision": ("stat", "dyn"),
    "scope": ("loc", "glob", "per part", "glob->loc", "none"),
    "supervision": ("supervised", "semi", "self", "unsupervised", "none"),
    "models": ("mlp", "cnn", "vit", "ssm", "bert", "llm", "clip", "vlm", "vla", "diffusion"),
}
"""Every axis and its members, in the order in which they are written."""

MEANING: dict[str, str] = {
    "W": "weight",
    "N": "neuron",
    "F": "filter",
    "C": "channel",
    "H": "head",
    "L": "layer",
    "B": "block",
    "E": "embedding dim",
    "X": "expert",
    "T": "token",
    "A": "attention pattern",
    "Win": "window or tile",
    "P": "prompt-time patches",
    "S": "saliency map",
    "unstr": "unstructured",
    "struct": "structured",
    "univ": "universal speed-up",
    "spec": "needs sparse kernels",
    "PBT": "before training",
    "PDT": "during training",
    "PAT": "after training",
    "PAT-PT": "after training, without retraining",
    "RT": "run time",
    "MAG": "magnitude",
    "NORM": "norm",
    "SAL": "saliency",
    "LOSS": "loss change",
    "REG": "learned or regularised mask",
    "META": "meta-learning",
    "GNN": "graph network",
    "RL": "reinforcement learning",
    "ATT": "attention",
    "DIV": "diversity",
    "COV": "coverage",
    "TXT": "text similarity",
    "ENT": "entropy",
    "VAL": "value norm",
    "ACT": "activation change",
    "CONF": "confidence",
    "CLU": "clustering",
    "UNI": "uniform grid",
    "GATE": "trained scorer",
    "shot": "one shot",
    "iter": "several rounds, stages or layers",
    "free": "no data",
    "input": "only the current input",
    "calib": "calibration samples",
    "data": "training set",
    "init": "initial weights",
    "early": "weights early in training",
    "pre": "pre-trained weights",
    "scratch": "trained from scratch",
    "tune": "fine-tuning",
    "train": "training",
    "module": "only the added module is trained",
    "orig": "original task",
    "transf": "transfer",
    "stat": "static",
    "dyn": "dynamic, per input",
    "loc": "local",
    "glob": "global",
    "glob->loc": "global allocation, local ranking",
}
"""What the short forms stand for; free-text search reads it too."""

WEIGHT_LEVEL = frozenset({"W", "N", "F", "C", "H", "L", "B", "E", "X"})
_SETS = ("objects", "criteria", "fusion", "models")
_EITHER = {
    "order": ("shot", "iter"),
    "start": ("init", "pre"),
    "task": ("orig", "transf"),
    "decision": ("stat", "dyn"),
}
_NOT_PRUNING = frozenset({"S", "tool"})

Axis = str | Collection[str] | None
"""One member as a string, several as a frozenset, None where the axis does not apply."""
UNSAID: Any = "unsaid"
"""The value of a field that a record leaves to the kind of its method."""


@dataclass(frozen=True, kw_only=True, repr=False)
class MethodInfo:
    """The position of one method on the axes of the survey.

    Values are written as in the survey's table and checked: `"a/b"` alternatives and `"a+b"` combined (both become a
    frozenset), `"either"` both and `"any"` all members of an axis, `"-"` or None not applicable. `objects` and `models`
    are separated by blanks, `fusion` by commas. `objects`, `criteria`, `fusion` and `models` are always frozensets.

    A record of an own method may be short: what it leaves out of the first seven fields, and then of the axes, is as usual for
    the kind of method that it stands in.

    >>> info = MethodInfo(title="Wanda", spec="weight-baselines", objects="W", granularity="unstr/N:M", speedup="spec",
    ...                   when="PAT-PT", criteria="MAG", order="shot", data="calib", scope="loc", models="llm")
    >>> info.when, info.training_free, "W" in info.objects
    ('PAT-PT', True, True)

    Raises `SecateurError` for an unknown member and for combinations that exclude each other.
    Spec: survey-taxonomy.
    """

    title: str = UNSAID
    spec: str = UNSAID
    objects: Collection[str] = UNSAID
    granularity: Axis = UNSAID
    speedup: Axis = UNSAID
    when: Axis = UNSAID
    criteria: Collection[str] = UNSAID
    order: Axis = UNSAID
    data: Axis = UNSAID
    start: Axis = UNSAID
    recovery: Axis = UNSAID
    task: Axis = UNSAID
    decision: Axis = UNSAID
    scope: Axis = UNSAID
    fusion: Collection[str] = UNSAID
    supervision: Axis = UNSAID
    models: Collection[str] = UNSAID
    budget_exact: bool | None = UNSAID
    budget_unit: str | None = UNSAID
    stages: int = UNSAID
    name: str = ""
    description: str = ""
    year: int | None = None
    arxiv: str | None = None
    refs: Collection[str] = ()
    """GitHub repositories as `owner/name`, or addresses."""

    def __post_init__(self) -> None:
        if not self.short:
            for name, value in _REST.items():
                if getattr(self, name) == UNSAID:
                    object.__setattr__(self, name, value)
        for axis in (*AXES, "fusion"):
            if getattr(self, axis) != UNSAID:
                object.__setattr__(self, axis, _axis_value(axis, getattr(self, axis), self.name or self.spec))
        refs = self.refs.split() if isinstance(self.refs, str) else self.refs
        object.__setattr__(self, "refs", tuple(refs))
        if not self.short:
            _validate(self)

    def __repr__(self) -> str:
        said = [
            f"{name}={notation(self, name)}" for name in FIELDS if getattr(self, name) not in (UNSAID, "", ())
        ]
        text = f"MethodInfo({', '.join(part for part in said if not part.endswith('=-'))})"
        return "\n".join(textwrap.wrap(text, 79, subsequent_indent="    ", break_on_hyphens=False))

    @property
    def short(self) -> bool:
        """Whether it leaves out what only a kind of method can add."""
        return any(getattr(self, name) == UNSAID for name in _WRITTEN)

    def completed(self, pattern: MethodInfo, title: str) -> MethodInfo:
        """A short record with what it leaves out: axes and name of a pattern, and this title.

        >>> MethodInfo(when="PAT").completed(record("magnitude"), "Mine").criteria
        frozenset({'MAG'})
        """
        said = {name: getattr(self, name) for name in FIELDS if getattr(self, name) != UNSAID}
        axes = {name: getattr(pattern, name) for name in (*_WRITTEN, *_REST)}
        return MethodInfo(**{**axes, "title": title, "spec": "none", "name": pattern.name} | _named(said))

    def members(self, axis: str) -> frozenset[str]:
        """The members of an axis as a set, whether it holds one, several or none."""
        return _as_set(getattr(self, axis))

    @property
    def training_free(self) -> bool:
        """It can be used as published without any training: recovery is none, or none/LoRA."""
        recovery = self.members("recovery")
        return "none" in recovery and recovery <= {"none", "LoRA"}

    @property
    def needs_labels(self) -> bool:
        return self.members("supervision") == {"supervised"}

    @property
    def kernel_needed(self) -> bool:
        """No speed-up without sparse kernels."""
        return self.members("speedup") == {"spec"}

    @property
    def changes_shapes(self) -> bool:
        """What is left is dense and smaller: units or tokens leave."""
        return bool(self.members("granularity") & {"struct", "token"})

    @property
    def weight_level(self) -> bool:
        """It prunes parameters, as opposed to tokens, attention or nothing."""
        return bool(self.members("objects") & WEIGHT_LEVEL)

    @property
    def links(self) -> tuple[str, ...]:
        """The paper and the code, as addresses."""
        paper = (f"https://arxiv.org/abs/{self.arxiv}",) if self.arxiv else ()
        return paper + tuple(ref if "://" in ref else f"https://github.com/{ref}" for ref in self.refs)


_WRITTEN = ("title", "spec", "objects", "granularity", "speedup", "when", "criteria")
"""What a whole record says; without one of them it is short."""
_REST: dict[str, Any] = {
    "order": "shot",
    "data": "free",
    "start": "pre",
    "recovery": "none",
    "task": "orig",
    "decision": "stat",
    "scope": "loc",
    "fusion": frozenset(),
    "supervision": "unsupervised",
    "models": frozenset(),
    "budget_exact": True,
    "budget_unit": None,
    "stages": 1,
}
"""What a whole record means where it doesn't say more."""


def _named(fields: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in fields.items() if key != "name" or value}


FLAGS = ("training_free", "needs_labels", "kernel_needed", "changes_shapes", "weight_level")
FIELDS = tuple(field.name for field in dataclasses.fields(MethodInfo))


def _as_set(value: Any) -> frozenset[str]:
    if value is None:
        return frozenset()
    return frozenset({value} if isinstance(value, str) else value)


def _split(axis: str, text: str) -> list[str]:
    text = text.strip()
    if text in ("-", ""):
        return []
    separator = {"fusion": ",", "objects": r"[\s/+,]+", "models": r"[\s/+,]+"}.get(axis, r"[/+]")
    return [part.strip() for part in re.split(separator, text) if part.strip()]


def parse_members(axis: str, value: object) -> frozenset[str]:
    """The members that a value in table notation names.

    >>> sorted(parse_members("criteria", "ATT+ENT"))
    ['ATT', 'ENT']
    """
    if value is None:
        return frozenset()
    if not isinstance(value, (str, Collection)):
        raise SecateurError(f"{value!r} is not text", where=axis, fix="give a member, or several as 'a/b'")
    parts = _split(axis, value) if isinstance(value, str) else list(value)
    if axis == "fusion":
        return frozenset(parts)
    legal = AXES[axis]
    found: set[str] = set()
    for part in parts:
        if part == "any":
            found.update(member for member in legal if member not in ("none", "tool", "S"))
        elif part == "either" and axis in _EITHER:
            found.update(_EITHER[axis])
        elif part in legal:
            found.add(part)
        else:
            choose(part, legal, where=axis, error=f"{part!r} is not a member of the axis", near=1, cutoff=0.5)
    return frozenset(found)


def _axis_value(axis: str, value: object, where: str) -> Axis:
    try:
        found = parse_members(axis, value)
    except SecateurError as error:
        raise SecateurError(error.what, where=f"record {where}, {axis}", fix=error.fix) from None
    if axis in _SETS:
        return found
    return None if not found else next(iter(found)) if len(found) == 1 else found


def _validate(info: MethodInfo) -> None:
    def refuse(what: str, fix: str) -> None:
        raise SecateurError(what, where=f"record {info.name or info.spec}", fix=fix)

    granularity, when, objects = info.members("granularity"), info.members("when"), info.members("objects")
    if not objects:
        refuse("it prunes nothing", "name its objects, or 'tool'")
    pruning = not objects <= _NOT_PRUNING
    if ("none" in granularity) == pruning or (not pruning and granularity - {"none"}):
        refuse("granularity is none for saliency maps and tools, and only for them", "set granularity")
    if pruning:
        for axis in AXES:
            if axis not in ("models", "supervision") and not info.members(axis):
                refuse(f"{axis} is missing", "'-' is for saliency maps and tools")
    if "dyn" in info.members("decision") and not when <= {"RT", "PDT"}:
        refuse(
            "a decision per input is taken at run time", "set when to RT, PDT or PDT+RT, or decision to stat"
        )
    if granularity & {"unstr", "N:M"}:
        allowed = {"spec"} if granularity <= {"unstr", "N:M"} else {"spec", "mixed"}
        if not info.members("speedup") <= allowed:
            refuse("unstructured and N:M sparsity is no faster without sparse kernels", "set speedup to spec")
    if "PBT" in when and "init" not in info.members("start"):
        refuse("pruning before training starts from the initial weights", "set start to init")
    if isinstance(info.stages, bool) or not isinstance(info.stages, int) or info.stages < 1:
        refuse(f"stages is {info.stages!r}", "give the number of stages, 1 or more")
    if info.members("order") == {"shot"} and info.stages > 1:
        refuse(f"one shot with {info.stages} stages", "set order to iter")


# ---------------------------------------------------------------- tables

_COLUMNS: dict[str, str] = {
    "title (short)": "title",
    "spec": "spec",
    "object": "objects",
    "granularity": "granularity",
    "speed-up": "speedup",
    "when": "when",
    "how": "criteria",
    "order": "order",
    "data": "data",
    "start": "start",
    "recovery": "recovery",
    "task": "task",
    "decision": "decision",
    "scope": "scope",
    "fusion": "fusion",
    "stages": "stages",
    "supervision": "supervision",
    "models": "models",
    "exact": "budget_exact",
    "unit": "budget_unit",
    "name": "name",
    "year": "year",
    "arXiv": "arxiv",
    "code": "refs",
    "description": "description",
}


def notation(info: MethodInfo, field: str) -> str:
    """One field of a record as a table writes it: `ATT+ENT`, `none/LoRA`, `H N`, `-`."""
    value = getattr(info, field)
    if field == "fusion":
        return ",".join(sorted(value)) or "-"
    if field in AXES:
        members = info.members(field)
        every = {member for member in AXES[field] if member != "none"}
        if field in ("when", "criteria", "models") and members == every:
            return "any"
        if field in ("order", "start") and members == set(_EITHER[field]):
            return "either"
        between = " " if field in ("objects", "models") else "+" if field in ("criteria", "when") else "/"
        return between.join(member for member in AXES[field] if member in members) or "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple):
        return " ".join(value) or "-"
    return "-" if value is None or value == "" else str(value)


def _cells(line: str) -> list[str]:
    parts = re.split(r"(?<!\\)\|", line.strip().removeprefix("|").removesuffix("|"))
    return [part.strip().replace(r"\|", "|") for part in parts]


def _rows(text: str) -> list[dict[str, str]]:
    lines = [line for line in text.splitlines() if line.lstrip().startswith("|")]
    if len(lines) < 2:
        raise SecateurError("there is no table in the text", where="taxonomy", fix="give a markdown table")
    header, rows = _cells(lines[0]), [_cells(line) for line in lines[2:]]
    for row in rows:
        if len(row) != len(header):
            raise SecateurError(
                f"{len(row)} cells under {len(header)} headings", where=row[0], fix="mend the table"
            )
    return [dict(zip(header, row)) for row in rows]


def _record(row: dict[str, str]) -> MethodInfo:
    values: dict[str, Any] = {}
    for heading, cell in row.items():
        if heading == "#":
            continue
        field = _COLUMNS[choose(heading, _COLUMNS, error=f"unknown column {heading!r}", where="taxonomy")]
        if field in AXES or field == "fusion":
            values[field] = cell
        elif field in ("stages", "year"):
            values[field] = int(cell) if cell != "-" else None
        elif field == "budget_exact":
            values[field] = {"yes": True, "no": False, "-": None}[cell]
        elif field == "refs":
            values[field] = () if cell == "-" else tuple(cell.split())
        elif field in ("arxiv", "budget_unit"):
            values[field] = None if cell == "-" else cell
        else:
            values[field] = "" if cell == "-" else cell
    made = MethodInfo(**values)
    if made.short:
        missing = ", ".join(name for name in _WRITTEN if getattr(made, name) == UNSAID)
        raise SecateurError(f"{missing} is missing", where="taxonomy", fix="give all columns up to criteria")
    return made


def render(records: Iterable[MethodInfo]) -> str:
    """A markdown table, one row a record, in the survey's notation; `parse` reads it back to equal records.

    >>> parse(render([record("nirvana")])) == [record("nirvana")]
    True
    """
    lines = ["| # | " + " | ".join(_COLUMNS) + " |", "| --- " * (len(_COLUMNS) + 1) + "|"]
    for number, info in enumerate(records, 1):
        cells = [notation(info, field).replace("|", r"\|") for field in _COLUMNS.values()]
        lines.append(f"| {number} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def parse(text: str) -> list[MethodInfo]:
    """The records of a markdown table; columns that are missing take their defaults.

    Raises `SecateurError` where a cell, a column or a combination is not legal.
    """
    return [_record(row) for row in _rows(text)]


@functools.cache
def _published() -> dict[str, MethodInfo]:
    details = {row["spec"]: row for row in _rows(_tables.DETAILS)}
    rows = _rows(_tables.CLASSIFICATION)
    records = [_record(row | details.pop(row["spec"], {})) for row in rows]
    if details:
        raise SecateurError(
            f"details without a classification: {', '.join(details)}", where="records", fix="add rows"
        )
    if len({info.spec for info in records}) != len(records):
        raise SecateurError("a spec is listed twice", where="records", fix="one row a spec")
    return {info.spec: info for info in records}


RECORDS: tuple[MethodInfo, ...] = tuple(_published().values())
"""The 50 published systems, in the order of the sheet."""


@functools.cache
def _baselines() -> dict[str, MethodInfo]:
    return {info.name: info for info in map(_record, _rows(_tables.BASELINES))}


def record(spec: str, **overrides: Any) -> MethodInfo:
    """The record of a published system or of a baseline, for a method file to adopt or adapt.

    >>> record("nirvana").training_free
    True
    >>> record("spa", recovery="none", when="PAT-PT").training_free
    True

    Raises `SecateurError` with the nearest names when there is none.
    """
    known = {**_published(), **_baselines()}
    fix = "write MethodInfo(...) for a method outside the survey"
    choose(spec, known, what="record", where="taxonomy", near=3, fix=fix)
    return dataclasses.replace(known[spec], **overrides)


# ---------------------------------------------------------------- queries


def searched(info: MethodInfo) -> tuple[str, str, str]:
    """What a search reads: the name; title, description, year and addresses; what its axes mean."""
    said = [info.title, info.description, str(info.year or ""), info.arxiv or "", *info.refs]
    members = [member for axis in (*AXES, "fusion") for member in info.members(axis) if member != "none"]
    meant = [f"{member} {MEANING.get(member, '')} {ALSO.get(member, '')}" for member in members]
    free = "training-free" if info.training_free else ""
    return info.name or info.spec, " . ".join(said), " . ".join([*meant, free])


def gist(info: MethodInfo) -> str:
    """A record as two sentences, for a search by meaning.

    >>> gist(record("divprune"))
    'DivPrune: Keeps the subset of visual tokens whose smallest pairwise distance is largest. Pruning of tokens by diversity, at run time, without training.'
    """

    def named(axis: str) -> str:
        return " and ".join(MEANING[m] for m in AXES[axis] if m in info.members(axis) and m in MEANING)

    if info.members("granularity") == {"none"}:
        return f"{info.title}: {info.description}" + (" A saliency map." if "S" in info.objects else "")
    what = " and ".join(f"{MEANING[m]}s" for m in AXES["objects"] if m in info.objects)
    by = f" by {named('criteria')}" if named("criteria") and len(info.criteria) < 5 else ""
    when = f", {named('when')}" if len(info.members("when")) == 1 else ""
    trained = "without training" if info.training_free else "with training"
    return f"{info.title}: {info.description} Pruning of {what}{by}{when}, {trained}."


def _test(key: str, wanted: object) -> Callable[[MethodInfo], bool]:
    if key in AXES or key == "fusion":
        if wanted is None or wanted == "-":
            return lambda info: not info.members(key)
        members = parse_members(key, wanted)
        return lambda info: bool(info.members(key) & members)
    choose(key, (*AXES, *FLAGS, *FIELDS), what="filter", where="methods", near=1)
    return lambda info: getattr(info, key) == wanted


def filter_records(
    records: Iterable[MethodInfo], search: str | None = None, **filters: Any
) -> list[MethodInfo]:
    """The records that pass every filter, in their order; with `search` those that fit its words best come first.

    A filter is an axis or a field of `MethodInfo` or a derived flag (`training_free`, `needs_labels`, `kernel_needed`,
    `changes_shapes`, `weight_level`). On an axis a record passes if any of its members is asked for. `search`: words of
    names, titles, descriptions and the meanings of the axes; what fits less than half as well as the best is left out.

    >>> [info.spec for info in filter_records(RECORDS, when="RT", training_free=True, criteria="TXT")]
    ['recoverable-compression', 'mmtok']
    >>> [info.spec for info in filter_records(RECORDS, "pyramid attention")][:2]
    ['lrs-dip', 'psa']

    Raises `SecateurError` for an unknown filter or member.
    """
    tests = [_test(key, wanted) for key, wanted in filters.items() if not (key in FLAGS and wanted is None)]
    found = [info for info in records if all(test(info) for test in tests)]
    if not (search or "").strip():
        return found
    return [found[number] for number, _ in ranked(search or "", [searched(info) for info in found])]


HARDWARE = {
    "gpu-dense": frozenset({"struct", "token"}),
    "cpu": frozenset({"struct", "token"}),
    "gpu-2:4": frozenset({"struct", "token", "N:M"}),
    "sparse": frozenset({"struct", "token", "block", "unstr", "N:M"}),
    "storage": frozenset({"struct", "unstr", "N:M"}),
}
"""What can pay off on which hardware; `storage`: only size counts."""

_DATA = {"none": ("free",), "calib": ("free", "calib"), "train": ("free", "calib", "data")}


def _reasons(info: MethodInfo) -> list[str]:
    """What speaks for a method, read off its record."""
    granularity, data = info.members("granularity"), info.members("data")
    why = []
    if info.members("speedup") & {"univ", "mixed"}:
        why.append("what it leaves is dense, so ordinary hardware is faster")
    elif "N:M" in granularity:
        why.append("N:M sparsity runs faster on 2:4 hardware")
    else:
        why.append("sparse kernels, or storage, gain from it")
    if info.training_free:
        why.append("it needs no training")
    if "dyn" in info.members("decision"):
        why.append("it decides per input")
    if "free" in data:
        why.append("it needs no data")
    elif "input" in data:
        why.append("it reads only the current input")
    elif "calib" in data:
        why.append("a few calibration samples are enough")
    return why
