"""What `doctor` found, in a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.text import Text

from secateur.report.terminal import table

STYLES = {"ok": "green", "tested": "green", "failed": "bold red", "not run": "yellow", "not installed": "dim"}


def print_doctor(found: Mapping[str, Any], console: Console) -> None:
    """Versions, checks, and for those that failed what that means and what to do."""
    versions = table("library", "installed", "tested", "")
    for row in found["versions"]:
        span = " to ".join(dict.fromkeys((row["oldest"], row["newest"])))
        versions.add_row(row["package"], row["installed"] or "-", span, _styled(row["state"]))
    console.print(versions)
    checks = table("check", "on", "", "largest error", "seconds", right=("largest error", "seconds"))
    for row in found["checks"]:
        error = "-" if row["error"] is None else f"{row['error']:.1g}"
        checks.add_row(row["check"], row["model"], _styled(row["state"]), error, f"{row['seconds']:.1f}")
    console.print(checks)
    said: set[str] = set()
    for row in found["checks"]:
        if row["state"] == "ok":
            continue
        console.print(
            Text.assemble(f"{row['check']} ({row['model']}): ", _styled(row["state"]), f", {row['reason']}")
        )
        if row["means"]:
            console.print(f"  this means: {row['means']}", markup=False)
        if row["fix"] and row["fix"] not in said:
            said.add(row["fix"])
            console.print(f"  to do: {row['fix']}", markup=False)
    console.print(Text(_verdict(found), style="bold"))


def _styled(state: str) -> Text:
    return Text(state, style=STYLES.get(state, "yellow"))


def _verdict(found: Mapping[str, Any]) -> str:
    rows = found["checks"]
    bad = sum(row["state"] == "failed" for row in rows)
    ran = sum(row["state"] != "not run" for row in rows)
    text = f"{bad} of {ran} checks failed" if bad else f"all {ran} checks that ran here are ok"
    strange = [row["package"] for row in found["versions"] if row["state"] not in ("tested", "not installed")]
    if strange:
        text += f"; {' and '.join(strange)} outside the tested versions"
    return f"{text} ({found['seconds']:.0f} s)"
