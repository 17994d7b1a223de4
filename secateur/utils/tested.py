"""Which versions of the libraries underneath are installed, and which were tested: `tested.json`, by release."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import warnings
from collections.abc import Iterable
from pathlib import Path

from packaging.version import InvalidVersion, Version

from secateur.errors import SecateurWarning

TESTED = Path(__file__).parent / "tested.json"


def tested_versions() -> dict[str, dict[str, str]]:
    """{"transformers": {"oldest": "5.18.0", "newest": "5.24.0"}, ...}: the test suite passed at both ends."""
    return json.loads(TESTED.read_text(encoding="utf-8"))


def installed_versions() -> dict[str, str | None]:
    """The installed version of each tested library; None where it isn't installed."""
    return {package: version_of(package) for package in tested_versions()}


def version_of(package: str) -> str | None:
    """The installed version; None where it isn't installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def compare_versions() -> list[dict[str, str | None]]:
    """A row a library: package, installed, oldest, newest (tested), and `state`: tested, newer than tested, older than
    tested, not installed, or unknown where the version can't be read.

    A patch release of a tested minor version counts as tested.
    """
    installed = installed_versions()
    return [
        {
            "package": package,
            "installed": installed[package],
            **span,
            "state": _state(installed[package], span),
        }
        for package, span in tested_versions().items()
    ]


def _state(version: str | None, span: dict[str, str]) -> str:
    if version is None:
        return "not installed"
    try:
        here = Version(version)
    except InvalidVersion:
        return "unknown"
    if here.release[:2] > Version(span["newest"]).release[:2]:
        return "newer than tested"
    # 5.18.0.dev0 and release candidates come before 5.18.0; a local part (+cpu) says nothing
    return "older than tested" if here < Version(span["oldest"]) else "tested"


def requirement(package: str) -> str:
    """What pip must be given for a tested version.

    >>> requirement("transformers")  # doctest: +SKIP
    'transformers>=5.18.0,<5.25'
    """
    span = tested_versions()[package]
    major, minor = Version(span["newest"]).release[:2]
    return f"{package}>={span['oldest']},<{major}.{minor + 1}"


def untested(packages: Iterable[str] | None = None) -> list[str]:
    """Those of `packages` (default: all) that are installed in a version outside the tested range."""
    rows = compare_versions()
    wanted = None if packages is None else set(packages)
    return [
        str(row["package"])
        for row in rows
        if row["state"] not in ("tested", "not installed") and (wanted is None or row["package"] in wanted)
    ]


@functools.cache
def warn_outside_tested(package: str) -> None:
    """Warn once in a process where the installed version of `package` was never tested, and say how to find out more.

    >>> warn_outside_tested("transformers")
    """
    if package not in untested([package]):
        return
    row = next(row for row in compare_versions() if row["package"] == package)
    warnings.warn(
        f"{package} {row['installed']} is {row['state']} ({row['oldest']} to {row['newest']});"
        f" `secateur doctor` checks in a minute whether the results are right with it",
        SecateurWarning,
        stacklevel=3,
    )
