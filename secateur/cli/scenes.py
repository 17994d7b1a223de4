"""`secateur train scenes`: train a small vision-language model on synthetic scenes, or tune it on real pictures."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from secateur.cli.flags import OUTPUT, SWITCH, Settings, flag, listed
from secateur.cli.shared import JSON_HELP, RESUME_HELP, check_new_folder, quiet_stdout, show


@dataclass(frozen=True, kw_only=True)
class Scenes:
    """What is trained, and where."""

    variant: Literal["llava", "qwen"] = flag("llava: CLIP and Llama; qwen: Qwen2.5-VL, no CLS", "llava")
    seed: int = flag("of the weights and of the pictures", 0)
    data: Literal["scenes", "easy_vqa", "nlvr"] = flag(
        "easy_vqa, nlvr: tune the model that comes with the library on real files of SECATEUR_DATA", "scenes"
    )
    device: str = flag("cpu, cuda, cuda:1, mps, ...", "cpu")
    threads: int | None = flag("threads of the processor; default: as many as there are cores", None)
    out: Annotated[str, OUTPUT] = flag("a new folder for the model")
    resume: Annotated[bool, OUTPUT] = flag(RESUME_HELP, True)
    every: Annotated[int, OUTPUT] = flag("steps between checkpoints", 500)
    limit: Annotated[int, OUTPUT] = flag("test pictures to measure accuracy on at the end", 256)
    json: Annotated[bool, OUTPUT, SWITCH] = flag(JSON_HELP, False)


def train_scenes(*, flags: Scenes, settings: Settings) -> None:
    """Train a small vision-language model that answers five kinds of question about synthetic pictures.

    A run that was stopped goes on where it was: give the same command again. A quarter of an hour on one core.
    """
    import torch

    from secateur.report.tokens import print_training
    from secateur.tasks.scenes.evaluate import accuracy, test_set
    from secateur.tasks.scenes.models import save_scenes
    from secateur.tasks.scenes.train import Recipe

    check_new_folder(flags.out)
    out = Path(flags.out).expanduser()
    own = vars(settings) | {"slots": listed(vars(settings)["slots"])}
    recipe = Recipe(variant=flags.variant, seed=flags.seed, **own)
    if flags.threads:
        torch.set_num_threads(flags.threads)
    work = out.with_name(out.name + ".run")
    place = (flags.device, work, flags.every, flags.resume)
    with quiet_stdout():
        if flags.data != "scenes":
            from secateur.tasks.scenes.real import train_real

            model, about = train_real(flags.data, recipe, *place)
        else:
            from secateur.tasks.scenes.train import train_scenes as run

            model, about = run(recipe, *place)
            about["accuracy"] = accuracy(model, test_set(flags.limit))
        save_scenes(model, out, about)
        shutil.rmtree(work, ignore_errors=True)
    show({**about, "out": flags.out}, flags.json, lambda console: print_training(about, flags.out, console))
