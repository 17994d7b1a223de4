"""`secateur train-prune`: train a task's network and prune it on the way."""

from __future__ import annotations

import dataclasses
import inspect
import shlex
import shutil
import sys
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cyclopts import Group

from secateur.cli.flags import fields_as_flags, flag, in_group, listed, own_flag, word
from secateur.errors import SecateurError
from secateur.training.recipe import Recipe

TASK = "cifar10, digits, sr, camvid, or one with a network: cifar10:resnet56"
TEXT = """Train a network on a task and prune it on the way.

With --method NAME, --help shows the method's hyperparameters too. Under torchrun the batches are shared by its processes."""


def parameters(method: str | None, json: inspect.Parameter) -> list[inspect.Parameter]:
    """Flags of `train-prune`; with a method's name, its hyperparameters too."""
    from secateur.pruning.options import Options
    from secateur.training.train_prune import MEANT

    recipe, output = Group("Recipe (default: the task's)", sort_key=2), Group("Output", sort_key=4)
    made = [
        word("task", help=TASK),
        flag("method", help="a method that prunes while it trains: `secateur methods` lists them"),
        flag("target", help="what holds at the end: 20% (share kept), 'params<=100e6', 'macs<=50%', 2:4"),
        flag("epochs", float | None, None, "length of one training; default: the task's"),
        flag("steps", int | None, None, "the length in steps instead"),
        flag(
            "seed",
            int,
            0,
            "of the initial weights, the order of the data, and all else that is drawn by chance",
        ),
        flag("train", int | None, None, "train on at most so many samples"),
        flag("test", int | None, None, "measure quality on at most so many samples"),
        flag("device", str | None, None, "cpu, cuda, cuda:1, mps, ...; default: cpu"),
    ]
    made += _recipe_flags(recipe)
    options = fields_as_flags(Options, Group("Options", sort_key=3))
    made += [parameter for parameter in options if parameter.name in MEANT]
    made += [
        flag("out", str | None, None, "a new folder for the result", output),
        flag("resume", bool, False, "go on with the unfinished run of the same command", output),
        flag("every", int, 100, "steps between checkpoints, which lie in OUT.run until the run ends", output),
        flag("report", str | None, None, "a self-contained HTML file with the report", output),
        in_group(json, output),
    ]
    if method is not None:
        cls = _class(method)
        taken = {parameter.name for parameter in made}
        group = Group(f"Hyperparameters of {cls.name}", sort_key=1)
        made += fields_as_flags(cls, group, lambda field: own_flag(cls.name, field, taken))
    return made


def _recipe_flags(group: Group) -> list[inspect.Parameter]:
    """The fields of a recipe without defaults: what isn't given is the task's."""
    helps = {item.name: item.metadata["help"] for item in dataclasses.fields(Recipe)}
    made = []
    for parameter in fields_as_flags(Recipe):
        kind = typing.get_args(parameter.annotation)[0]
        made.append(flag(parameter.name, kind | None, None, helps[parameter.name], group))
    return made


def _class(method: str) -> Any:
    from secateur.method import list_methods, method_class
    from secateur.training.method import TrainMethod

    cls = method_class(method)
    if not issubclass(cls, TrainMethod):
        known = [name for name in list_methods() if issubclass(method_class(name), TrainMethod)]
        raise SecateurError(
            f"{cls.name} prunes without training",
            where="--method",
            fix=f"use `secateur prune`, or one of {', '.join(known)}",
        )
    return cls


def run(task: str, **given: Any) -> None:
    from secateur.cli.shared import _argv, check_new_file, check_new_folder, quiet_stdout, show
    from secateur.tasks import load_task
    from secateur.training.parallel import is_main

    out, page = given["out"], given["report"]
    if is_main():
        check_new_folder(out)
        check_new_file(page)
    work = _work_folder(out, given["resume"] or not is_main())
    with quiet_stdout():
        cls = _class(given["method"])
        taken = {parameter.name for parameter in parameters(None, flag("json", bool, False))}
        fields = {item.name: own_flag(cls.name, item.name, taken) for item in dataclasses.fields(cls)}
        settings: dict[str, Any] = {
            name: given[flag_] for name, flag_ in fields.items() if given.get(flag_) is not None
        }
        settings |= _recipe(given)
        settings |= {name: given[name] for name in _meant() if name in given}
        settings["kinds"] = listed(given.get("kinds")) or None
        pruned = _train(load_task(task, train=given["train"], test=given["test"]), cls, settings, given, work)
        report = pruned.report
        report |= {"model": task, "out": out, "command": shlex.join(["secateur", *_argv])}
        if is_main():
            _write(pruned, out, page)
            if work:
                shutil.rmtree(work, ignore_errors=True)
    if is_main():
        show(report, given["json"], lambda console: _draw(report, console))


def _train(task: Any, cls: Any, settings: dict[str, Any], given: Mapping[str, Any], work: Path | None) -> Any:
    import torch

    from secateur.training.train_prune import train_prune

    try:
        torch.empty(0, device=given["device"])
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise SecateurError(
            f"{given['device']!r} can't be used ({reason})", where="--device", fix="cpu works"
        ) from error
    return train_prune(
        task,
        method=cls.name,
        target=given["target"],
        epochs=given["epochs"],
        steps=given["steps"],
        seed=given["seed"],
        device=given["device"],
        resume=work,
        every=given["every"],
        clean=False,
        **settings,
    )


def _meant() -> tuple[str, ...]:
    from secateur.training.train_prune import MEANT

    return MEANT


def _recipe(given: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a recipe that were given; tuples are written with commas."""
    found: dict[str, Any] = {}
    for item in dataclasses.fields(Recipe):
        value = given[item.name]
        if value is None:
            continue
        if isinstance(item.default, tuple):
            try:
                value = tuple(float(part) for part in listed(value))
            except ValueError:
                raise SecateurError(
                    f"{value!r} isn't numbers", where=f"--{item.name}", fix="write them as 0.5,0.75"
                ) from None
        found[item.name] = value
    return found


def _work_folder(out: str | None, resume: bool) -> Path | None:
    """Where the run's checkpoints lie: beside the result. Refuses to start over an unfinished run."""
    if out is None:
        if resume:
            raise SecateurError(
                "there is nothing to go on with", where="--resume", fix="name the folder with --out"
            )
        return None
    work = Path(f"{Path(out).expanduser()}.run")
    if work.exists() and not resume:
        raise SecateurError(
            "an unfinished run is there",
            where=str(work),
            fix="go on with --resume, or remove it to start anew",
        )
    return work


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
