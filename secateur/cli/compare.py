"""`secateur compare` and `secateur report`."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from secateur.cli.flags import OUTPUT, SWITCH, flag, listed
from secateur.cli.shared import JSON_HELP, Shown, check_new_file, quiet_stdout, show
from secateur.errors import SecateurError
from secateur.utils.screen import counted

TASK = Parameter(help="digits, cifar10:resnet20, scenes, smollm2, ..., or the folder of a language model")
FOLDER = Parameter(help="a folder that `secateur compare` wrote")
BASELINE = "a method that others are tested against beside chance; default: magnitude, or its like"


@dataclass(frozen=True, kw_only=True)
class Compare:
    """What is compared."""

    methods: str = flag("names with commas, or all that fit", "all")
    targets: str = flag("shares of the cost that may stay", "80%,60%,40%")
    seeds: int = flag("runs of each method and target, with seeds 0, 1, ...", 3)
    cost: Literal["params", "macs", "tokens"] | None = flag(
        "what budgets are counted in; default: params (that aren't zero), or tokens (times layers)", None
    )
    steps: int = flag(
        "training steps: of methods that train, and after the cut of those that don't; 0: none", 0
    )
    samples: int = flag("calibration samples, the same for all methods", 128)
    train: int | None = flag("train on at most so many samples", None)
    test: int | None = flag("judge on at most so many samples, pictures or windows", None)
    latency: bool = flag("time each result beside the dense model", True)
    threads: int = flag("of each run", 1)
    minutes: float | None = flag("processor minutes after which a run is stopped; its row says so", None)
    geometry: Annotated[bool, SWITCH] = flag(
        "of classifiers of pictures: angle, norm and margin of the last features, clean and under corruptions",
        False,
    )
    geometry_pictures: int = flag("pictures of which the geometry is gathered", 200)
    geometry_corruptions: str = flag(
        "common (fifteen), all (nineteen), or names with commas, such as fog,gaussian_noise", "common"
    )


@dataclass(frozen=True, kw_only=True)
class Engine:
    """Who runs it, and where rows go."""

    out: Annotated[str, OUTPUT] = flag("a folder for the rows; the same command goes on with what is missing")
    jobs: Annotated[int, OUTPUT] = flag("processes", 1)
    engine: Annotated[Literal["local", "ray"], OUTPUT] = flag("local processes, or a Ray cluster", "local")
    address: Annotated[str | None, OUTPUT] = flag("of the Ray cluster; default: one on this machine", None)
    baseline: Annotated[str | None, OUTPUT] = flag(BASELINE, None)
    json: Annotated[bool, OUTPUT, SWITCH] = flag(JSON_HELP, False)


def compare(task: Annotated[str, TASK], /, *, flags: Compare, engine: Engine) -> None:
    """Compare methods on the same work, at the same cost, beside chance and the dense model."""
    from secateur.comparison.run import compare as run
    from secateur.comparison.summary import as_json, summary
    from secateur.report.comparison import print_comparison
    from secateur.utils.progress import bar

    if engine.address and engine.engine != "ray":
        raise SecateurError("an address is Ray's", where="--address", fix="--engine ray")
    own = ("methods", "targets", "seeds", "cost")
    settings = {name: value for name, value in vars(flags).items() if name not in own}
    if flags.cost is not None:
        settings["cost"] = flags.cost
    with quiet_stdout(), contextlib.ExitStack() as stack:

        def progress(count: int) -> Any:
            advance = stack.enter_context(bar(f"comparing on {task}", count))
            return lambda row: advance(1)

        found = run(
            task,
            listed(flags.methods),
            listed(flags.targets),
            flags.seeds,
            out=engine.out,
            jobs=engine.jobs,
            engine=engine.engine,
            address=engine.address,
            progress=progress,
            **settings,
        )
    lines = as_json(summary(found.setup, found.rows, engine.baseline))
    value = {"setup": found.setup.as_json(), "lines": lines, "damaged": found.damaged, "out": engine.out}
    show(value, engine.json, lambda console: _draw(found, engine, print_comparison, console))


def _draw(found: Any, engine: Engine, draw: Any, console: Any) -> None:
    draw(found.setup, found.rows, console, engine.baseline)
    if found.damaged:
        lines = counted(found.damaged, "line")
        console.print(f"{lines} of rows.jsonl couldn't be read: kept in damaged.jsonl, and run again")
    console.print(f"rows: {engine.out}/rows.jsonl; secateur report {engine.out} --out page.html draws them")


@dataclass(frozen=True, kw_only=True)
class Report:
    """What is written."""

    out: Annotated[str | None, OUTPUT] = flag(
        "a new .html file; default: a table in the terminal alone", None
    )
    baseline: Annotated[str | None, OUTPUT] = flag(BASELINE, None)


def report(directory: Annotated[str, FOLDER], /, *, flags: Report, shown: Shown) -> None:
    """Show a comparison: a table, and a page that sorts, filters and shows each run."""
    from secateur.comparison.rows import read_about, read_rows
    from secateur.comparison.setup import Setup
    from secateur.comparison.summary import as_json, summary
    from secateur.report.comparison import print_comparison, write_comparison

    check_new_file(flags.out, "--out")
    folder = Path(directory).expanduser()
    setup, rows = Setup.read(read_about(folder)["setup"], directory), read_rows(folder)
    if not rows:
        raise SecateurError("no run has ended yet", where=directory, fix="give `secateur compare` time")
    value = {
        "setup": setup.as_json(),
        "lines": as_json(summary(setup, rows, flags.baseline)),
        "out": flags.out,
    }
    if flags.out:
        write_comparison(Path(flags.out).expanduser(), setup, rows, flags.baseline, directory, folder)
    show(value, shown.json, lambda console: print_comparison(setup, rows, console, flags.baseline))
