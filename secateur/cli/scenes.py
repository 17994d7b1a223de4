"""`secateur train scenes`: train a small vision-language model on synthetic scenes, or tune it on real pictures."""

from __future__ import annotations

import dataclasses
import inspect
import shutil
from pathlib import Path
from typing import Any, Literal

from cyclopts import Group

from secateur.cli.flags import fields_as_flags, flag, in_group
from secateur.tasks.scenes.train import Recipe

TEXT = """Train a small vision-language model that answers five kinds of question about synthetic pictures.

A run that was stopped goes on where it was: give the same command again. A quarter of an hour on one core."""


def parameters(json: inspect.Parameter) -> list[inspect.Parameter]:
    """Flags of `train scenes`: the fields of the recipe, the place, the output."""
    recipe, output = Group("Recipe", sort_key=2), Group("Output", sort_key=4)
    own = [p for p in fields_as_flags(Recipe, recipe) if p.name not in ("variant", "seed")]
    return [
        flag("variant", Literal["llava", "qwen"], "llava", "llava: CLIP and Llama; qwen: Qwen2.5-VL, no CLS"),
        flag("seed", int, 0, "of the weights and of the pictures"),
        flag(
            "data",
            Literal["scenes", "easy_vqa", "nlvr"],
            "scenes",
            "easy_vqa, nlvr: tune the model that comes with the library on real files of SECATEUR_DATA",
        ),
        flag("device", str, "cpu", "cpu, cuda, cuda:1, mps, ..."),
        flag("threads", int | None, None, "threads of the processor; default: as many as there are cores"),
        *own,
        flag("out", str, help="a new folder for the model", group=output),
        flag("resume", bool, True, "go on with the unfinished run of the same command, in OUT.run", output),
        flag("every", int, 500, "steps between checkpoints", output),
        flag("limit", int, 256, "test pictures to measure accuracy on at the end", output),
        in_group(json, output),
    ]


def run(**given: Any) -> None:
    import torch

    from secateur.cli.shared import check_new_folder, quiet_stdout, show
    from secateur.report.tokens import print_training
    from secateur.tasks.scenes.evaluate import accuracy, test_set
    from secateur.tasks.scenes.models import save_scenes

    check_new_folder(given["out"])
    out = Path(given["out"]).expanduser()
    work = out.with_name(out.name + ".run")
    names = {item.name for item in dataclasses.fields(Recipe)}
    settings = {name: given[name] for name in names if name in given}
    settings["slots"] = tuple(part.strip() for part in settings["slots"].split(",") if part.strip())
    recipe = Recipe(**settings)
    if given["threads"]:
        torch.set_num_threads(given["threads"])
    with quiet_stdout():
        if given["data"] != "scenes":
            from secateur.tasks.scenes.real import train_real

            place = (given["device"], work, given["every"], given["resume"])
            model, about = train_real(given["data"], recipe, *place)
        else:
            from secateur.tasks.scenes.train import train_scenes

            model, about = train_scenes(recipe, given["device"], work, given["every"], given["resume"])
            about["accuracy"] = accuracy(model, test_set(given["limit"]))
        save_scenes(model, out, about)
        shutil.rmtree(work, ignore_errors=True)
    show(
        {**about, "out": given["out"]},
        given["json"],
        lambda console: print_training(about, given["out"], console),
    )
