"""`secateur train sod`: learn which objects stand out; and what `secateur saliency` draws with what was learned."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from secateur.cli.flags import OUTPUT, SWITCH, Settings, flag
from secateur.cli.shared import (
    JSON_HELP,
    RESUME_HELP,
    at_least,
    check_device,
    check_new_file,
    check_new_folder,
    method_entry,
    quiet_stdout,
    show,
    work_folder,
)
from secateur.errors import SecateurError

DEFAULT = "connnet"
FILE = "objects.json"


@dataclass(frozen=True, kw_only=True)
class Sod:
    """What learns, on which network's maps, and where it goes."""

    method: str = flag("connnet, psod, or file.py:Class", DEFAULT)
    backbone: str = flag(
        "efficientnet-lite0, or vit-s-focus; it stays as it is, and the head learns on its maps",
        "efficientnet-lite0",
    )
    steps: int = flag("steps of training, eight pictures in each", 400)
    seed: int = flag("of the weights, the order, and which 50 of the pictures are held out", 0)
    pictures: int | None = flag("learn from at most this many photographs", None)
    scenes: int | None = flag(
        "drawn scenes with several objects to learn from too; default: 200 where a method gives several opinions (psod), else none",
        None,
    )
    device: str = flag("cpu, cuda, cuda:1, mps, ...", "cpu")
    threads: int | None = flag("threads of the processor; default: as many as there are cores", None)
    out: Annotated[str, OUTPUT] = flag("a new folder for what was learned")
    resume: Annotated[bool, OUTPUT] = flag(RESUME_HELP, True)
    every: Annotated[int, OUTPUT] = flag("steps between checkpoints", 100)
    json: Annotated[bool, OUTPUT, SWITCH] = flag(JSON_HELP, False)


def object_method(name: str) -> dict[str, Any]:
    """The catalogue's entry of a method that learns objects."""
    return method_entry(name, "train sod", "doesn't learn objects")


def train_sod(*, flags: Sod, settings: Settings) -> None:
    """Learn from photographs with masks (ECSSD) which objects stand out, and judge it by 50 that were held out.

    `secateur saliency FOLDER IMAGE` draws with it. With --method NAME, --help shows the method's hyperparameters too.
    A run that was stopped goes on where it was: give the same command again.
    """
    import torch

    check_new_folder(flags.out)
    for name in ("steps", "pictures", "scenes", "every"):
        at_least(f"--{name}", getattr(flags, name), 0 if name == "scenes" else 1)
    check_device(flags.device)
    if flags.threads:
        torch.set_num_threads(flags.threads)
    work = work_folder(flags.out, flags.resume)
    with quiet_stdout():
        from secateur.data.ecssd import load_ecssd
        from secateur.method import make_method
        from secateur.saliency.objects.method import ObjectMethod
        from secateur.tasks import sod
        from secateur.tasks.scenes.opinions import draw_opinions

        method, spec = make_method(flags.method, **vars(settings)), sod.backbone(flags.backbone)
        assert isinstance(method, ObjectMethod)
        pictures, masks = load_ecssd("train", flags.pictures, flags.seed)
        drawn = (200 if method.several else 0) if flags.scenes is None else flags.scenes
        more = draw_opinions(drawn, flags.seed, spec.size)
        finder = sod.train_sod(
            method, pictures + more[0], masks + more[1], backbone=spec, steps=flags.steps, seed=flags.seed,
            device=flags.device, directory=work, every=flags.every,
        )  # fmt: skip
        held, truths = load_ecssd("test", seed=flags.seed)
        figures = sod.judge(finder.find(held), truths)
        finder.about |= {"figures": figures.table(), "scenes": drawn}
        finder.save(flags.out)
        shutil.rmtree(work, ignore_errors=True)
    about = {"method": finder.method.name, "backbone": spec.name, **finder.about, "out": flags.out}
    show(about, flags.json, lambda console: _figures(about, console))


def _figures(about: Mapping[str, Any], console: Any) -> None:
    from secateur.report.terminal import table

    made = table("figure of 50 held-out pictures", "value", right=("value",))
    names = {
        "f_max": "F-measure, highest", "f_adaptive": "F-measure, adaptive", "e_max": "E-measure, highest",
        "e_adaptive": "E-measure, adaptive", "s": "S-measure", "mae": "mean absolute error", "iou": "IoU of the mask",
        "components": "pieces of the mask",
    }  # fmt: skip
    for key, name in names.items():
        made.add_row(name, f"{about['figures'][key]:.3f}")
    console.print(made)
    console.print(f"{about['method']} on {about['backbone']}; folder: {about['out']}", markup=False)


def finds(argv: Sequence[str]) -> bool:
    """Whether a command line names a folder that `secateur train sod` wrote."""
    folders = (os.path.expanduser(word) for word in argv if not word.startswith("-"))
    return any(os.path.isfile(os.path.join(folder, FILE)) for folder in folders)


def find_objects(folder: str, image: str, flags: Any) -> None:
    """What stands out in a picture, drawn at the picture's own size."""
    import numpy as np
    import torch

    check_device(flags.device)
    given = [n for n in ("target", "meta", "blur", "size", "mean", "std", "dtype") if getattr(flags, n)]
    if given:
        raise SecateurError(
            "it means nothing to what finds objects",
            where=", ".join(f"--{name}" for name in given),
            fix="leave it out: the folder says how pictures are read",
        )
    with quiet_stdout():
        from secateur.saliency.objects.picture import draw_objects
        from secateur.saliency.picture import save_png
        from secateur.tasks.sod import load_objects
        from secateur.utils.pictures import open_picture

        finder = load_objects(folder, flags.device)
        if flags.method not in (None, finder.method.name):
            raise SecateurError(
                f"the folder holds {finder.method.name}", where=f"--method {flags.method}", fix="leave it out"
            )
        pixels = torch.from_numpy(np.array(open_picture(image)))
        found = finder.find([pixels.permute(2, 0, 1)])[0]
        liked = [
            {"score": round(float(score), 4), "share": round(float(mask.float().mean()), 4)}
            for mask, score in zip(found.masks[0], found.scores[0])
            if mask.any()
        ]
        objects = None if found.instances is None else int(found.instances.max())
        if flags.out:
            check_new_file(flags.out, "--out")
            said = [f"{finder.method.name} on {finder.spec.name}", _told(liked, objects)]
            save_png(draw_objects(found, pixels, said), flags.out)
            print(f"picture: {flags.out}", file=sys.stderr)
    value = {
        "model": folder, "image": image, "method": finder.method.name, "backbone": finder.spec.name,
        "masks": liked, "instances": objects, "size": list(pixels.shape[:2]), "out": flags.out,
    }  # fmt: skip
    show(value, flags.json, lambda console: _draw(value, console))


def _told(masks: Sequence[Mapping[str, float]], objects: int | None) -> str:
    if not masks:
        return "nothing stands out"
    if objects is not None:
        return f"{objects} object{'s' * (objects != 1)}, {masks[0]['share']:.1%} of the picture".replace(
            "%", " %"
        )
    parts = (f"{m['score']:.2f} ({m['share']:.1%})".replace("%", " %") for m in masks)
    return f"{len(masks)} opinion{'s' * (len(masks) != 1)}, liked {', '.join(parts)}"


def _draw(value: Mapping[str, Any], console: Any) -> None:
    console.print(f"[bold]{value['model']}[/bold]  {value['method']} on {value['backbone']}")
    console.print(_told(value["masks"], value["instances"]))
    if value["out"] is None:
        console.print("--out found.png writes the picture")
