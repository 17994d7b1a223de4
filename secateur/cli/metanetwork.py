"""`secateur train metanetwork`: make the network that `--method metapruning` changes other networks with."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from secateur.cli.flags import OUTPUT, SWITCH, Settings, flag
from secateur.cli.shared import (
    DEVICE_HELP,
    JSON_HELP,
    RESUME_HELP,
    check_device,
    check_new_folder,
    quiet_stdout,
    show,
    work_folder,
)
from secateur.cli.train import TASK, recipe_of

LATER = ("metanetwork", "last")
"""Hyperparameters of the method that only pruning needs."""


@dataclass(frozen=True, kw_only=True)
class Metanetwork:
    """What is trained on, how long, and where it goes."""

    epochs: float | None = flag("length of one training of a data model; default: the task's", None)
    steps: int | None = flag("the length in steps instead", None)
    seed: int = flag("of the data models' weights, the order of the data, and the metanetwork", 0)
    train: int | None = flag("train on at most this many samples", None)
    device: str | None = flag(DEVICE_HELP, None)
    out: Annotated[str, OUTPUT] = flag("a new folder for the metanetwork")
    resume: Annotated[bool, OUTPUT] = flag(RESUME_HELP, True)
    every: Annotated[int, OUTPUT] = flag("steps between checkpoints", 100)
    json: Annotated[bool, OUTPUT, SWITCH] = flag(JSON_HELP, False)


def train_metanetwork(
    task: Annotated[str, TASK], /, *, flags: Metanetwork, settings: Settings, recipe: Settings
) -> None:
    """Train a metanetwork: it changes the weights of a task's networks so that cutting them hurts less.

    It takes `models` trainings and more. A run that was stopped goes on where it was: give the same command again.
    """
    check_new_folder(flags.out)
    from secateur.tasks import load_task
    from secateur.training.metanetwork import save_metanetwork
    from secateur.training.metatraining import Making
    from secateur.training.metatraining import train_metanetwork as run

    out = Path(flags.out).expanduser()
    work = work_folder(flags.out, flags.resume)
    with quiet_stdout():
        loaded = load_task(task, train=flags.train)
        check_device(flags.device)
        meta, about = run(
            loaded,
            Making(**vars(settings)),
            epochs=flags.epochs,
            steps=flags.steps,
            seed=flags.seed,
            device=flags.device,
            recipe=loaded.recipe.replace(**recipe_of(recipe)),
            directory=work,
            every=flags.every,
        )
        save_metanetwork(meta, out, about)
        shutil.rmtree(work, ignore_errors=True)
    show({**about, "out": flags.out}, flags.json, lambda console: _draw(about, flags.out, console))


def _draw(about: Mapping[str, Any], out: str, console: Any) -> None:
    from secateur.report.terminal import table

    made = table(
        "phase", "steps", "loss", "loss after the cut", right=("steps", "loss", "loss after the cut")
    )
    for row in about["phases"]:
        numbers = [row.get("last_step"), row.get("loss"), row.get("loss_after_the_cut")]
        made.add_row(row["phase"], *("" if n is None else f"{n:.4g}" for n in numbers))
    console.print(made)
    console.print(f"metanetwork: {out}")
