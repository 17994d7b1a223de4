"""`secateur train-prune`: train a task's network and prune it on the way."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from secateur.cli.flags import OUTPUT, SWITCH, Settings, flag, listed
from secateur.cli.shared import (
    DEVICE_HELP,
    JSON_HELP,
    REPORT_HELP,
    Drawn,
    check_device,
    check_new_file,
    check_new_folder,
    method_entry,
    quiet_stdout,
    show,
    work_folder,
)
from secateur.errors import SecateurError

TASK = Parameter(
    help="cifar10, digits, sr, camvid, sst2, text, ..., one with a network, cifar10:resnet56, or the folder of a pipeline of diffusers"
)


@dataclass(frozen=True, kw_only=True)
class Train:
    """What is trained, how long, and what is written."""

    method: str = flag(
        "a method that prunes while it trains: `secateur methods` lists them, or file.py:Class"
    )
    target: str | None = flag(
        "what holds at the end: 20% (share kept), 'params<=100e6', 'macs<=50%', 2:4; none for methods that skip work while the network runs",
        None,
    )
    epochs: float | None = flag("length of one training; default: the task's", None)
    steps: int | None = flag("the length in steps instead", None)
    seed: int = flag("of the initial weights, the order of the data, and all else that is drawn at random", 0)
    train: int | None = flag("train on at most this many samples", None)
    test: int | None = flag("measure quality on at most this many samples", None)
    device: str | None = flag(DEVICE_HELP, None)
    out: Annotated[str | None, OUTPUT] = flag("a new folder for the result", None)
    resume: Annotated[bool, OUTPUT] = flag(
        "go on with an unfinished run of this command; no: start it again", True
    )
    every: Annotated[int, OUTPUT] = flag(
        "steps between checkpoints, which lie in OUT.run, or the cache, until the run ends", 100
    )
    report: Annotated[str | None, OUTPUT] = flag(REPORT_HELP, None)
    json: Annotated[bool, OUTPUT, SWITCH] = flag(JSON_HELP, False)


def train_method(name: str) -> dict[str, Any]:
    """The catalogue's entry of a method that prunes while it trains."""
    return method_entry(name, "train-prune", "prunes without training", "use `secateur prune`, or ")


def train_prune(
    task: Annotated[str, TASK],
    /,
    *,
    flags: Train,
    drawn: Drawn,
    settings: Settings,
    recipe: Settings,
    options: Settings,
    line: str,
) -> None:
    """Train a network on a task and prune it on the way.

    With --method NAME, --help shows the method's hyperparameters too. Under torchrun the batches are shared by its processes.
    """
    from secateur.report.summary import alarms
    from secateur.training.parallel import is_main
    from secateur.training.train_prune import train_prune as run

    out, page = flags.out, flags.report
    if is_main():
        check_new_folder(out)
        check_new_file(page)
    asked = drawn.asked
    work = flags.resume if out is None else work_folder(out, flags.resume or not is_main())
    with quiet_stdout():
        train_method(flags.method)
        own = {name: value for name, value in vars(settings).items() if value is not None}
        own |= recipe_of(recipe) | vars(options) | {"kinds": listed(vars(options)["kinds"]) or None}
        network = _network(task, flags)
        check_device(flags.device)
        pruned = run(
            network,
            method=flags.method,
            target=flags.target,
            epochs=flags.epochs,
            steps=flags.steps,
            seed=flags.seed,
            device=flags.device,
            resume=work,
            every=flags.every,
            clean=not isinstance(work, Path),  # the result is written before its folder goes
            **asked,
            **own,
        )
        report = pruned.report
        report |= {"model": task, "out": out, "command": line}
        report["collapsed"] = alarms(report)
        if is_main():
            _write(pruned, out, page)
            if isinstance(work, Path):
                shutil.rmtree(work, ignore_errors=True)
    if is_main():
        show(report, flags.json, lambda console: _draw(report, console))


def _network(task: str, flags: Train) -> Any:
    """A task, or the pipeline of a folder."""
    from secateur.io.pipelines import is_pipeline_folder, load_pipeline
    from secateur.tasks import load_task

    folder = Path(task).expanduser()
    if not is_pipeline_folder(folder):
        return load_task(task, train=flags.train, test=flags.test)
    if flags.train is not None or flags.test is not None:
        raise SecateurError(
            "a pipeline brings no data",
            where="--train, --test",
            fix="leave them out; --prompts says what is drawn",
        )
    return load_pipeline(folder)


def recipe_of(flags: Settings) -> dict[str, Any]:
    """The fields of a recipe that are set; tuples are written with commas."""
    from secateur.training.recipe import Recipe

    recipe: dict[str, Any] = {}
    for name, value in vars(flags).items():
        if value is None:
            continue
        if isinstance(getattr(Recipe, name), tuple):
            try:
                value = tuple(float(part) for part in listed(value))
            except ValueError:
                raise SecateurError(
                    f"{value!r} isn't numbers", where=f"--{name}", fix="write them as 0.5,0.75"
                ) from None
        recipe[name] = value
    return recipe


def _write(pruned: Any, out: str | None, page: str | None) -> None:
    from secateur.report.html import library_versions, write_report

    pruned.report["versions"] = library_versions()
    if out:
        pruned.save(Path(out).expanduser())
        print(f"model: {out}", file=sys.stderr)
    if page:
        write_report(Path(page).expanduser(), {**pruned.report, "scores": {}}, pruned.plan)
        print(f"report: {page}", file=sys.stderr)


def _draw(report: Mapping[str, Any], console: Any) -> None:
    """The report, and one row for each phase of training."""
    from secateur.report.summary import figure
    from secateur.report.terminal import print_report, table

    print_report(report, console)
    metric = report["task"]["metric"]
    numbers = [r for r in report["phases"] if "last_step" in r]
    made = table("phase", "steps", "kept", "loss", metric, right=("steps", "kept", "loss", metric))
    for row in numbers:
        kept = f"{row['density']:.1%}".replace("%", " %") if row.get("density") is not None else ""
        loss = f"{row['loss']:.4g}" if row.get("loss") is not None else ""
        made.add_row(
            row["phase"],
            f"{row['first_step']}–{row['last_step']}",
            kept,
            loss,
            figure(metric, row["quality"]) if row.get("quality") is not None else "",
        )
    console.print(made)
    if rows := [row for row in report["phases"] if "order_distance" in row]:
        known = ("prune_distance", "prune_angle", "order_distance", "order_angle", "order_barrier")
        names = [name for name in known if name in rows[0]]
        made = table("stability", *(name.replace("_", " ") for name in names))
        for row in rows:
            made.add_row(f"{row['mask']} mask", *(f"{row[name]:.4g}" for name in names))
        console.print(made)
