"""The page of `secateur demo`: one file, with its pictures in it."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from secateur.report.html import render
from secateur.report.summary import alarms, busy, in_seconds, left, notes, rows
from secateur.report.terminal import before_after
from secateur.report.tokens import print_tokens, token_rows
from secateur.utils.files import atomic_write_text

JPEG = 88
"""Quality of photographs in the page; drawings stay PNG."""


def write_demo(path: str | Path, found: Mapping[str, Any], folder: str | Path) -> None:
    """Write the page, whole or not at all.

    >>> write_demo("demo/index.html", found, "demo")  # doctest: +SKIP

    found: what the command prints with --json: `language`, a report of `prune` with `prompts` and `answers`; `tokens` and
    `saliency`, of these verbs, or {"missing": why}. folder: what pictures and the full report are named relative to.
    """
    atomic_write_text(path, demo_html(found, Path(folder)))


def demo_html(found: Mapping[str, Any], folder: Path) -> str:
    """The page as text."""
    language, tokens, saliency = found["language"], found["tokens"], found["saliency"]
    head = [
        ("took", in_seconds(found["seconds"]), ""),
        ("processors", str(os.cpu_count()), ""),
        ("secateur", str(found["versions"].get("secateur", "")), ""),
    ]
    remarks = []
    if found.get("quick"):
        remarks.append("a quick look at small random models: what they say means nothing")
    if warning := busy(language["before"], tokens["before"]):
        remarks.append(warning)
    return render(
        "demo.html",
        title="secateur demo",
        head=head,
        remarks=remarks,
        language=_language(language),
        report=os.path.relpath(language["report"], folder) if language.get("report") else "report.html",
        tokens=_tokens(tokens),
        saliency=_saliency(saliency),
        versions=[(name, str(value)) for name, value in found["versions"].items()],
    )


def _language(report: Mapping[str, Any]) -> dict[str, Any]:
    sides = zip(report["prompts"], report["answers"]["before"], report["answers"]["after"], strict=True)
    figures = rows(report["before"], report["after"], report.get("speed"))
    timed = any(row.speed for row in figures)
    return {
        "text": f"The default method looked at the model and the target ({report['target']} of the weights in its blocks) and chose"
        f" {report['method']}; then what was left was trained for a moment. {left(report).capitalize()}.",
        "command": report["command"],
        "lines": [row.texts for row in figures],
        "speed": "Times: both models in turn, the median and the middle half of the pairs." if timed else "",
        "remarks": [*alarms(report), *notes(report)],
        "answers": [
            {"prompt": prompt, "before": before.strip(), "after": after.strip()}
            for prompt, before, after in sides
        ],
    }


def _tokens(found: Mapping[str, Any]) -> dict[str, Any]:
    right = f" The right answer is {found['expected']}." if found.get("expected") else ""
    kept, whole = found["after"].get("visual_tokens"), found["before"].get("visual_tokens")
    return {
        "text": f"“{found['prompt']}” The model answers “{found['before']['answer']}” with all {whole} visual tokens and"
        f" “{found['after']['answer']}” with the {kept} that {found['method']} kept: those that are not dark here.{right}",
        "command": found["command"],
        "lines": token_rows(found),
        "remarks": list(found.get("collapsed") or ()),
        "picture": _embedded(found["out"]),
        "alt": f"The picture, and beside it the same picture with all but {kept} of its {whole} cells darkened.",
    }


def _saliency(found: Mapping[str, Any]) -> dict[str, Any]:
    if found.get("missing"):
        return {"missing": found["missing"]}
    name = found.get("name") or f"class {found['target']}"
    share = next(
        (item["probability"] for item in found["likeliest"] if item["class"] == found["target"]), None
    )
    sure = "" if share is None else f" ({share:.0%})".replace("%", " %")
    return {
        "missing": "",
        "text": f"{found['method']} marks what made the classifier say {name}{sure}: the brighter, the more.",
        "command": found["command"],
        "picture": _embedded(found["out"], photograph=True),
        "alt": f"A photograph, and beside it a map in colour that is brightest where {name} was seen.",
    }


def _embedded(file: str | Path, photograph: bool = False) -> str:
    """A picture as a data URI."""
    data, kind = Path(file).expanduser().read_bytes(), "png"
    if photograph:
        from PIL import Image

        smaller = io.BytesIO()
        Image.open(io.BytesIO(data)).convert("RGB").save(smaller, "JPEG", quality=JPEG)
        data, kind = smaller.getvalue(), "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def print_demo(found: Mapping[str, Any], console: Console) -> None:
    """The same in a terminal, short."""
    language = found["language"]
    console.print(f"[bold]a smaller language model[/]  {language['method']}  target {language['target']}")
    console.print(before_after(language))
    for prompt, *answers in zip(language["prompts"], *language["answers"].values(), strict=True):
        for side, answer in zip(language["answers"], answers, strict=True):
            console.print(Text(f"{side}: {prompt} … {' '.join(answer.split())}"))
    console.print()
    print_tokens(found["tokens"], console)
    saliency = found["saliency"]
    said = (
        f"not drawn: {saliency['missing']}" if saliency.get("missing") else f"saliency map: {saliency['out']}"
    )
    console.print(
        Text(f"\n{said}\n\ntook {in_seconds(found['seconds'])}\nopen {found['page']}"), soft_wrap=True
    )
