"""`secateur doctor`: are the results right with the libraries that are installed here?"""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from secateur.cli.shared import Shown, quiet_stdout, show

FAILED = 1
OWN = Parameter(
    help="check a tiny model of its class too: a folder, a name that `prune` takes, or scenes",
    show_default=False,
)


def doctor(model: Annotated[str | None, OWN] = None, /, *, shown: Shown) -> int:
    """Check that the results are right with the libraries installed here.

    Lists the installed and the tested versions, and runs the checks that matter on tiny random models, in about twenty seconds
    and without a network. Exit code 1: a check failed.
    """
    from secateur.doctor import doctor as run
    from secateur.report.doctor import print_doctor
    from secateur.utils.progress import track

    with quiet_stdout():
        report = run(model, progress=track)
    show(report, shown.json, lambda console: print_doctor(report, console))
    return 0 if report["ok"] else FAILED
