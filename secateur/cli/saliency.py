"""`secateur saliency`: where in a picture a class comes from, as a picture, and in a text the next token, as coloured words."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Group, Parameter

from secateur.cli import objects
from secateur.cli.flags import OUTPUT, SWITCH, Settings, flag, listed
from secateur.cli.shared import (
    DEVICE_HELP,
    JSON_HELP,
    check_new_file,
    method_entry,
    open_model,
    quiet_stdout,
    show,
)
from secateur.errors import SecateurError, require
from secateur.taxonomy.catalogue import catalogue
from secateur.utils.files import check_path

MODEL = Parameter(
    help="a classifier of pictures: a name such as efficientnet-lite0, a folder, an .onnx or .pt2 file; with --text a language model: smollm2 or a folder; or the folder of `train sod`"
)
IMAGE = Parameter(help="a picture: PNG, JPEG, ...")
PICTURE = Parameter(group=Group("Picture", sort_key=3))
DEFAULTS = ("normgrad", "lrp")
"""The map of a picture, and of a text."""
OWN = [name for name, entry in catalogue()["methods"].items() if entry["verb"] == "saliency"]


@dataclass(frozen=True, kw_only=True)
class Saliency:
    """The map, the class, and how the picture or text is read."""

    text: str | None = flag("in place of a picture: a text, whose tokens are read by a language model", None)
    method: str | None = flag(
        f"{', '.join(OWN)}, or file.py:Class; default: {DEFAULTS[0]}, of texts {DEFAULTS[1]}, or what the folder holds",
        None,
    )
    target: str | None = flag(
        "the class, or of texts the next token as it is written; default: the likeliest", None
    )
    meta: float = flag("learning rate of a step towards the class before the map is made (0.0025)", 0.0)
    blur: float = flag("sigma of a Gaussian over the map, as a share of the longer side (0.02)", 0.0)
    size: Annotated[str | None, PICTURE] = flag(
        "height,width that the model reads; default: what it says itself", None
    )
    mean: Annotated[str | None, PICTURE] = flag(
        "of each colour in 0..1, as r,g,b; default: the model's, or ImageNet's", None
    )
    std: Annotated[str | None, PICTURE] = flag("of each colour, as r,g,b", None)
    device: str | None = flag(DEVICE_HELP, None)
    dtype: str | None = flag("float32, bfloat16 or float16; default: float32", None)
    out: Annotated[str | None, OUTPUT] = flag(
        "the .png file to write: the picture at its own size, and the map in colour over it; of texts an .html file with coloured words",
        None,
    )
    json: Annotated[bool, OUTPUT, SWITCH] = flag(JSON_HELP, False)


def map_method(name: str) -> dict[str, Any]:
    """The catalogue's entry of a method that draws maps."""
    learned = [own for own, entry in catalogue()["methods"].items() if entry["verb"] == "train sod"]
    if name.strip().lower() in learned:
        raise SecateurError(
            f"{name} must learn first",
            where="--method",
            fix=f"secateur train sod --method {name} --out DIR, then secateur saliency DIR IMAGE",
        )
    return method_entry(name, "saliency", "draws no map")


def reads_text(argv: Sequence[str]) -> bool:
    """Whether a command line gives a text, whose maps have settings of their own."""
    return any(token == "--text" or token.startswith("--text=") for token in argv)


def saliency(
    model: Annotated[str, MODEL],
    image: Annotated[str | None, IMAGE] = None,
    /,
    *,
    flags: Saliency,
    settings: Settings,
) -> None:
    """Show where in a picture a class comes from, or which words of a text the next one comes from; or which objects stand out.

    With --method NAME, --help shows the map's hyperparameters too.
    """
    require(
        (image is None) != (flags.text is None),
        "a picture and a text are given" if flags.text is not None else "nothing is given to look at",
        where="saliency",
        fix="name a picture, or give --text 'some words' to a language model",
    )
    if flags.text is None:
        assert image is not None
        of_picture(model, image, flags, settings)
    else:
        of_text(model, flags.text, flags, settings)


def of_text(model: str, text: str, flags: Saliency, settings: Settings) -> None:
    from secateur.report.words import plain_words, write_words
    from secateur.saliency.text import text_saliency

    ending = Path(flags.out).suffix.lower() if flags.out is not None else ".html"
    require(
        ending == ".html",
        "words are written as HTML",
        where=f"--out {flags.out}",
        fix="end the name in .html",
    )
    check_new_file(flags.out, "--out")
    for name in ("meta", "blur", "size", "mean", "std"):
        require(
            not getattr(flags, name), "it is for pictures", where=f"--{name}", fix="leave it out with --text"
        )
    method = flags.method or DEFAULTS[1]
    own = {name: value for name, value in vars(settings).items() if value is not None}
    with quiet_stdout():
        network, tokenizer = open_model(model, flags.device, flags.dtype)
        require(
            tokenizer is not None, "it comes without a tokenizer", where=model, fix="give a language model"
        )
        found = text_saliency(network, tokenizer, text, method, flags.target, **own)
        if flags.out:
            write_words(flags.out, found, model)
            print(f"words: {flags.out}", file=sys.stderr)
    value = {
        "model": model, "text": text, "method": found.method, "target": found.target, "word": found.word,
        "logit": found.logit, "probability": found.probability,
        "likeliest": [{"word": w, "token": i, "probability": round(p, 4)} for w, i, p in found.likeliest],
        "additive": found.additive,
        "tokens": [{"text": t, "token": i, "value": v} for t, i, v in zip(found.tokens, found.ids, found.values.tolist(), strict=True)],
        "hyperparameters": found.hyperparameters, "out": flags.out,
    }  # fmt: skip
    show(value, flags.json, lambda console: plain_words(found, model, console))


def of_picture(model: str, image: str, flags: Saliency, settings: Settings) -> None:
    import numpy as np
    import torch

    from secateur.saliency import as_saliency_method
    from secateur.saliency import saliency as run
    from secateur.saliency.picture import draw_map, read_picture, save_png, window
    from secateur.utils.pictures import open_picture

    ending = Path(flags.out).suffix.lower() if flags.out is not None else ".png"
    require(
        ending == ".png", "the map is written as PNG", where=f"--out {flags.out}", fix="end the name in .png"
    )
    check_new_file(flags.out, "--out")
    if not Path(image).expanduser().is_file():
        raise SecateurError("no such picture", where=image, fix=check_path(image))
    if objects.finds([model]):
        objects.find_objects(model, image, flags)
        return
    own = vars(settings).copy()
    if own.get("weights"):
        own["weights"] = tuple(numbers(own["weights"], "--weights"))
    kind = as_saliency_method(flags.method or DEFAULTS[0], **own)
    target = class_number(flags.target)
    with quiet_stdout():
        network, _ = open_model(model, flags.device, flags.dtype)
        size, mean, std = reading_of(network, flags)
        x, _ = read_picture(image, size, mean, std)
        found = run(network, x, kind, target, meta=flags.meta, blur=flags.blur)
        likely = likeliest(network, x)
        assert isinstance(found.target, int)
        name = class_name(network, found.target)
        if flags.out:
            whole = torch.from_numpy(np.array(open_picture(image)))
            chance = next((f", {i['probability']:.1%}" for i in likely if i["class"] == found.target), "")
            said = [
                f"{name or 'class'} ({found.target}){chance}".replace("%", " %"),
                f"{found.method}, {model}",
            ]
            seen = window(whole.shape[:2], size)
            said += ["dark: what the network did not see"] * (seen[2:] != tuple(whole.shape[:2]))
            save_png(draw_map(found.values, whole, seen, said), flags.out)
            print(f"map: {flags.out}", file=sys.stderr)
    peak = divmod(int(found.values.argmax()), found.values.shape[1])
    value = {
        "model": model, "image": image, "method": found.method, "target": found.target, "name": name, "layers": list(found.layers),
        "likeliest": likely, "peak": {"row": peak[0], "column": peak[1]}, "size": list(found.values.shape),
        "hyperparameters": found.hyperparameters, "out": flags.out,
    }  # fmt: skip
    show(value, flags.json, lambda console: draw(value, console))


def class_number(text: str | None) -> int | None:
    try:
        return None if text is None else int(text)
    except ValueError:
        raise SecateurError(f"{text!r} is no class", where="--target", fix="give its number") from None


def reading_of(network: Any, flags: Saliency) -> tuple[tuple[int, int], list[float], list[float]]:
    """((height, width), mean, std) of the pictures that the model was made for.

    Raises `SecateurError` where the model reads none, or doesn't say their size.
    """
    from secateur.data.pictures import IMAGENET_MEAN, IMAGENET_STD
    from secateur.utils.inputs import picture_size

    config, timm = getattr(network, "config", None), getattr(network, "pretrained_cfg", None) or {}
    if getattr(config, "vocab_size", None) is not None and getattr(config, "image_size", None) is None:
        raise SecateurError(
            "it reads text, not pictures", where=type(network).__name__, fix="give a classifier"
        )
    if flags.size:
        sides = [int(part) for part in re.findall(r"\d+", flags.size)]
        if not 1 <= len(sides) <= 2 or min(sides) < 1:
            raise SecateurError(f"{flags.size!r} is no size", where="--size", fix="such as 224,224")
        height, width = sides[0], sides[-1]
    else:
        known = (picture_size(network) or ())[1:] or getattr(config, "image_size", None)
        if known is None and hasattr(network, "example_inputs"):
            example = network.example_inputs()
            first = next(iter(example.values())) if isinstance(example, dict) else example
            first = first[0] if isinstance(first, tuple | list) else first
            known = tuple(first.shape[2:]) if getattr(first, "ndim", 0) == 4 else None
        if not known:
            raise SecateurError(
                "it doesn't say the size of its pictures", where=type(network).__name__, fix="give --size"
            )
        height, width = (known, known) if isinstance(known, int) else known
    mean = numbers(flags.mean, "--mean") if flags.mean else list(timm.get("mean", IMAGENET_MEAN))
    std = numbers(flags.std, "--std") if flags.std else list(timm.get("std", IMAGENET_STD))
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise SecateurError(
            f"{mean} and {std} can't normalise a picture", where="--mean, --std", fix="three of each"
        )
    return (int(height), int(width)), mean, std


def numbers(text: str, where: str) -> list[float]:
    try:
        return [float(part) for part in listed(text)]
    except ValueError:
        raise SecateurError(f"{text!r} are no numbers", where=where, fix="such as 0.5,0.5,0.5") from None


def likeliest(network: Any, x: Any, count: int = 5) -> list[dict[str, Any]]:
    from secateur.saliency.record import record

    shares = record(network, x[None]).logits[0].float().softmax(0)
    top = shares.topk(min(count, len(shares)))
    return [
        {"class": int(c), "name": class_name(network, int(c)), "probability": round(float(p), 4)}
        for p, c in zip(*top)
    ]


def class_name(network: Any, number: int) -> str | None:
    """What a class is called, as far as the network or its data say."""
    if names := getattr(network, "class_names", None):
        return names[number] if number < len(names) else None
    told = getattr(getattr(network, "config", None), "id2label", None) or {}
    if (name := told.get(number)) and name != f"LABEL_{number}":
        return str(name)
    about = getattr(network, "pretrained_cfg", None) or {}
    if names := about.get("label_names"):
        return str(names[number])
    if about.get("num_classes") == 1000 == getattr(network, "num_classes", None):
        from timm.data import ImageNetInfo

        return str(ImageNetInfo().index_to_description(number)).partition(",")[0]
    return None


def called(number: int, name: str | None) -> str:
    return f"{number}" if name is None else f"{number} {name}"


def draw(value: dict[str, Any], console: Any) -> None:
    console.print(
        f"[bold]{value['model']}[/bold]  {value['method']}  class {called(value['target'], value['name'])}"
    )
    classes = "  ".join(
        f"{called(item['class'], item['name'])} ({item['probability']:.1%})" for item in value["likeliest"]
    )
    console.print(f"likeliest classes: {classes}")
    if value["layers"]:
        console.print(f"layers: {', '.join(value['layers'])}")
    height, width = value["size"]
    console.print(
        f"strongest at row {value['peak']['row']}, column {value['peak']['column']} of {height} x {width}"
    )
    if value["out"] is None:
        console.print("--out map.png writes the picture")
