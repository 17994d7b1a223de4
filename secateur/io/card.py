"""A model card: what lies in the folder, how it was made and measured, how it is loaded, and the command that repeats it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from secateur.pruning.report import command_line
from secateur.utils.about import __version__
from secateur.utils.files import atomic_write_text

NAME = "README.md"
SINGLE = {
    "params": "parameters",
    "params_nonzero": "non-zero parameters",
    "macs": "multiply-adds",
    "size_bytes": "bytes of weights",
}
BY_TASK = ("perplexity", "psnr", "accuracy")
LIBRARIES = {
    "AutoModel": "transformers",
    "from_pretrained": "transformers",
    "DiffusionPipeline": "diffusers",
    "timm.": "timm",
}
LICENCE = (
    "The weights come from the base model and stay under its licence, which its own page says. The licence of secateur"
    " (Apache-2.0) is that of the program that cut them, and not this model's."
)
CODE = ("trust_remote_code", "load_pruned")
"""What the line that loads says where it runs Python of the folder."""


def write_card(
    folder: Path, report: Mapping[str, Any], about: Mapping[str, Any], name: str | None = None
) -> None:
    """Write `README.md`, with YAML front matter as model hubs read it; whatever a name or a note holds is only text there.

    report: of the run, or {}. about: what `save_model` gives. name: what was pruned, where the report doesn't say.
    """
    atomic_write_text(folder / NAME, card(report, about, name))


def card(report: Mapping[str, Any], about: Mapping[str, Any], name: str | None = None) -> str:
    """The text of a card.

    >>> print(card({}, {"form": "plain", "load": "secateur.load(folder)", "why": None}, "Llama").splitlines()[-1])  # doctest: +SKIP
    """
    base = str(report.get("model") or name or "a model")
    method = report.get("method")
    what = "pruned" if method else "trained after pruning" if report.get("losses") else "saved"
    parts = [
        _front(base, about, method),
        f"# {escaped(Path(base).name or base)}, {what}",
        _made(base, report),
        *_measured(report),
        *_notes(report),
        *_load(about),
    ]
    if command := command_line(report):
        parts += ["## The same again", fenced(command, "sh")]
    parts += ["## Licence", LICENCE]
    return "\n\n".join(parts) + "\n"


def _front(base: str, about: Mapping[str, Any], method: Any) -> str:
    """What hubs filter by; a base model only where its name can be one of a hub."""
    load = str(about.get("load") or "")
    library = next((name for sign, name in LIBRARIES.items() if sign in load), "secateur")
    fields: dict[str, Any] = {"library_name": library}
    if re.fullmatch(r"[\w.-]+/[\w.-]+", base) and not Path(base).exists() and not base.startswith("."):
        fields["base_model"] = base
    fields["tags"] = ["secateur", "pruned", *([one_line(method)] if method else [])]
    return f"---\n{yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)}---"


def _made(base: str, report: Mapping[str, Any]) -> str:
    lines = [f"- base model: {escaped(base)}"]
    if report.get("method"):
        lines.append(f"- method: {escaped(report['method'])} of secateur {__version__}")
    if report.get("source"):
        lines.append(f"- the method comes from {escaped(report['source'])}")
    if report.get("target"):
        met = {True: ", met", False: ", not met"}.get(report.get("met"), "")  # type: ignore[arg-type]
        lines.append(f"- target, as the share or size that stays: {escaped(report['target'])}{met}")
    if report.get("seed") is not None:
        lines.append(f"- seed: {escaped(report['seed'])}")
    if trained := report.get("recovery"):
        lines.append(
            f"- trained after the cut: {escaped(trained.get('recover'))}, {escaped(trained.get('steps'))} steps"
        )
    elif losses := report.get("losses"):
        lines.append(
            f"- trained: {len(losses)} steps, loss {losses[0]:.4g} at the first, {losses[-1]:.4g} at the last"
        )
    return "\n".join(lines)


def _measured(report: Mapping[str, Any]) -> list[str]:
    """The table of figures; nothing where nothing was measured."""
    before, after = report.get("before") or {}, report.get("after") or {}
    rows = [(label, before.get(key), after.get(key)) for key, label in SINGLE.items()]
    for kind in BY_TASK:
        first, last = _flat(before.get(kind)), _flat(after.get(kind))
        rows += [
            (f"{kind}, {task}", first.get(task), last.get(task)) for task in dict.fromkeys([*first, *last])
        ]
    seen = [(label, a, b) for label, a, b in rows if a is not None or b is not None]
    if not seen:
        return []
    lines = ["| | before | after |", "| --- | ---: | ---: |"]
    lines += [f"| {escaped(label)} | {figure(a)} | {figure(b)} |" for label, a, b in seen]
    return ["## What was measured", "\n".join(lines)]


def _flat(found: Any) -> dict[str, Any]:
    """{task: value} of {task: value} or {task: {metric: value}}."""
    flat: dict[str, Any] = {}
    for task, value in (found or {}).items():
        if isinstance(value, Mapping):
            flat |= {f"{task} ({metric})": number for metric, number in value.items()}
        else:
            flat[str(task)] = value
    return flat


def _notes(report: Mapping[str, Any]) -> list[str]:
    notes = [*(report.get("collapsed") or ()), *(report.get("notes") or ())]
    return ["\n".join(f"- {escaped(note)}" for note in notes)] if notes else []


def _load(about: Mapping[str, Any]) -> Iterable[str]:
    load = str(about.get("load") or "secateur.load(folder)")
    yield "## How to load it"
    yield fenced(load, "python")
    if any(sign in load for sign in CODE):
        yield "This runs the Python file of this folder: read it first. `secateur.load(folder)` runs none of it."
    if about.get("why"):
        yield f"A plain folder could not hold it: {escaped(about['why'])}."


def figure(value: Any) -> str:
    """A number for a table.

    >>> figure(134515008), figure(20.4912), figure(None)
    ('134,515,008', '20.49', '–')
    """
    if not isinstance(value, int | float) or not math.isfinite(value):
        return "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def escaped(text: Any) -> str:
    """Text that Markdown shows as it is, in one line: no markup, no HTML, no end of a table's cell.

    >>> escaped("a_b | <b>")
    'a\\\\_b \\\\| &lt;b&gt;'
    """
    line = one_line(text)
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_{}\[\]#|~!])", r"\\\1", line)


def one_line(text: Any) -> str:
    """Text without line ends and other characters that steer."""
    return " ".join(re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", " ", str(text)).split())


def fenced(text: str, language: str) -> str:
    """A block of code that nothing in the text can end.

    >>> fenced("ls", "sh")
    '```sh\\nls\\n```'
    """
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"
