"""`doctor`: which library versions are here and which were tested, and whether the results that matter are right with them.

Libraries change under a pruning tool without an error: a renamed argument of a decoder layer makes answers wrong in silence.
So the checks run here and now, on tiny random models, against code that shares nothing with what it checks.
"""

from __future__ import annotations

import logging
import platform
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from secateur.errors import SecateurError
from secateur.utils.screen import fit
from secateur.utils.tested import (
    compare_versions,
    installed_versions,
    requirement,
    tested_versions,
    untested,
    version_of,
    warn_outside_tested,
)

if TYPE_CHECKING:
    from secateur.doctor.checks import Check, Subject

__all__ = ["doctor", "installed_versions", "tested_versions", "warn_outside_tested"]

Job = tuple["Check | str", "Subject | str", str]
"""A check, or the name of what can't be checked; its model, or why there is none; the name of the model."""


class Findings(dict[str, Any]):
    """A dictionary that JSON can hold; its repr is what isn't right."""

    def __repr__(self) -> str:
        states = Counter(row["state"] for row in self["checks"])
        said = ", ".join(f"{count} {state}" for state, count in states.items())
        lines = [f"doctor: {'ok' if self['ok'] else 'NOT ok'}: {said}; keys: {', '.join(self)}"]
        bad = sorted((row for row in self["checks"] if row["state"] != "ok"), key=lambda row: row["state"])
        lines += [f"  {row['state']}: {row['check']}, {row['model']}: {row.get('reason')}" for row in bad]
        other = [row for row in self["versions"] if row["state"] not in ("tested", "not installed")]
        return fit([*lines, *(f"  {row['package']} {row['installed']}: {row['state']}" for row in other)])


def doctor(model: Any = None, progress: Callable[..., Iterable] | None = None) -> Findings:
    """What is installed, what was tested, and the checks that ran here: `{"ok", "versions", "checks", ...}`.

    >>> found = secateur.doctor()  # doctest: +SKIP
    >>> [row["check"] for row in found["checks"] if row["state"] != "ok"]  # doctest: +SKIP
    []

    model: a folder, a name, a module or a transformers config. The checks that apply then run on a tiny random model of
    its class too: same layers, positions and switches, fewer and narrower; its own code is never run, and no network used.
    progress: `secateur.utils.progress.track` for a bar.

    Rows of `versions`: package, installed, oldest and newest (tested), state. Rows of `checks`: check, model, `state`
    ("ok", "failed", "not run"), the largest `error` and what is `allowed`, seconds and, where it isn't ok, `reason`,
    `means` and `fix`. `ok` is false where a check failed. Takes about twenty seconds on two cores.

    Raises `SecateurError` for a model that there isn't.
    """
    started = time.perf_counter()
    with _quiet():
        jobs = [*_built_in(), *(_own(model) if model is not None else [])]
        listed = jobs if progress is None else progress(jobs, "checks")
        rows = [_row(*job) for job in listed]
    return Findings(
        {
            "ok": all(row["state"] != "failed" for row in rows),
            "secateur": version_of("secateur"),
            "python": platform.python_version(),
            "versions": compare_versions(),
            "checks": rows,
            "seconds": time.perf_counter() - started,
        }
    )


def _built_in() -> list[Job]:
    from secateur.doctor.checks import CUT, SAVED, TOKENS
    from secateur.tasks import tiny

    jobs: list[Job] = []
    for make, checks in (
        (tiny.tiny_llava, TOKENS),
        (tiny.tiny_qwen, TOKENS),
        (tiny.tiny_llama, (CUT, SAVED)),
        (tiny.tiny_cnn, (CUT, SAVED)),
    ):
        name = make.__name__.replace("_", " ")
        jobs += [(check, subject, name) for subject in [_made(make, name)] for check in checks]
    return jobs


def _made(make: Callable[[], Any], name: str) -> Subject | str:
    import torch

    from secateur.doctor.checks import Subject
    from secateur.tasks import tiny

    try:
        with torch.random.fork_rng(devices=[]):
            model = make()
        return Subject(name, model, tiny.inputs_for(model))
    except Exception as error:  # noqa: BLE001  any way in which another version of a library can refuse
        return f"the model can't be built ({_told(error)})"


def _own(model: Any) -> list[Job]:
    import torch

    from secateur.doctor.checks import CUT, SAVED, TOKENS
    from secateur.doctor.subjects import Unfit, own_subject

    try:
        with torch.random.fork_rng(devices=[]):
            subject = own_subject(model)
    except Unfit as error:
        name = model if isinstance(model, str) else type(model).__name__
        return [("a tiny model of its class", str(error), name)]
    why = subject.without_tokens
    jobs: list[Job] = [(check, subject, subject.name) for check in (TOKENS if why is None else ())]
    jobs += [("visual tokens", why, subject.name)] if why else []
    return jobs + [(check, subject, subject.name) for check in (CUT, SAVED)]


def _row(check: Check | str, subject: Subject | str, name: str) -> dict[str, Any]:
    """Runs one check on a copy of its model; a failure of any kind is a row."""
    import copy

    if isinstance(check, str):
        row: dict[str, Any] = {
            "check": check,
            "model": name,
            "state": "not run",
            "reason": subject,
            "seconds": 0.0,
        }
        return row | dict.fromkeys(("error", "allowed", "means", "fix"))
    row = {"check": check.name, "model": name}
    row |= {"state": "ok", "error": None, "allowed": None, "seconds": 0.0}
    row |= dict.fromkeys(("reason", "means", "fix"))
    if isinstance(subject, str):
        row |= {"state": "failed", "reason": subject}
    else:
        started = time.perf_counter()
        try:
            own = replace(subject, model=copy.deepcopy(subject.model))
            row["error"], row["allowed"] = check.run(own)
            if not row["error"] <= row["allowed"]:
                row |= {
                    "state": "failed",
                    "reason": f"off by {row['error']:.2g}, where {row['allowed']:g} is allowed",
                }
        except SecateurError as error:
            # what secateur refuses of its own models is broken here; of the user's it may be beyond it
            row |= {"state": "not run" if subject.own else "failed", "reason": str(error)}
        except Exception as error:  # noqa: BLE001  any way in which another version of a library can fail
            row |= {"state": "failed", "reason": _told(error)}
        row["seconds"] = time.perf_counter() - started
    if row["state"] == "failed":
        row |= {"means": check.means, "fix": _fix(check)}
    return row


def _told(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _fix(check: Check) -> str:
    strange = untested(check.packages)
    if strange:
        return "pip install " + " ".join(f'"{requirement(package)}"' for package in strange)
    return (
        "the versions here are tested ones, so please report this with the output of `secateur doctor --json`"
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Nothing that other libraries have to say about tiny models reaches the screen."""
    from secateur.io.transformers import quiet

    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), quiet():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
