"""`secateur doctor`: are the results right with the libraries that are installed here?"""

from __future__ import annotations

import inspect
from typing import Any

from secateur.cli.flags import word

FAILED = 1
TEXT = """Check that the results are right with the libraries installed here.

Lists the installed and the tested versions, and runs the checks that matter on tiny random models, in about twenty seconds
and without a network. Exit code 1: a check failed."""


def parameters(json: inspect.Parameter) -> list[inspect.Parameter]:
    text = "check a tiny model of its class too: a folder, a name that `prune` takes, or scenes"
    return [word("model", str | None, None, help=text), json]


def run(model: str | None = None, **given: Any) -> int:
    from secateur.cli.shared import quiet_stdout, show
    from secateur.doctor import doctor
    from secateur.report.doctor import print_doctor
    from secateur.utils.progress import track

    with quiet_stdout():
        found = doctor(model, progress=track)
    show(found, given["json"], lambda console: print_doctor(found, console))
    return 0 if found["ok"] else FAILED
