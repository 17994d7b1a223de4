"""`secateur saliency`: where in a picture a class comes from, as a picture."""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
from pathlib import Path
from typing import Any

from cyclopts import Group

from secateur.cli.flags import fields_as_flags, flag, in_group, listed, word
from secateur.errors import SecateurError

DEFAULT = "normgrad"
TEXT = """Show where in a picture a class comes from.

With --method NAME, --help shows the map's hyperparameters too."""


def parameters(method: str | None, json: inspect.Parameter) -> list[inspect.Parameter]:
    """Flags of `saliency`; with the name of a map, its hyperparameters too."""
    from secateur.saliency import as_saliency_method, saliency_methods

    output, reading = Group("Output", sort_key=4), Group("Picture", sort_key=3)
    made = [
        word(
            "model",
            help="a classifier of pictures: a name such as efficientnet-lite0, a folder, an .onnx or .pt2 file",
        ),
        word("image", help="a picture: PNG, JPEG, ..."),
        flag("method", str, DEFAULT, ", ".join(saliency_methods())),
        flag("target", int | None, None, "the class; default: the likeliest"),
        flag("meta", float, 0.0, "learning rate of a step towards the class before the map is made (0.0025)"),
        flag("blur", float, 0.0, "sigma of a Gaussian over the map, as a share of the longer side (0.02)"),
        flag(
            "size",
            str | None,
            None,
            "height,width that the model reads; default: what it says itself",
            reading,
        ),
        flag(
            "mean",
            str | None,
            None,
            "of each colour in 0..1, as r,g,b; default: the model's, or ImageNet's",
            reading,
        ),
        flag("std", str | None, None, "of each colour, as r,g,b", reading),
        flag("device", str | None, None, "cpu, cuda, cuda:1, mps, ...; default: cpu"),
        flag("dtype", str | None, None, "float32, bfloat16 or float16; default: float32"),
        flag("out", str | None, None, "the .png file to write: the map in colour over the picture", output),
        in_group(json, output),
    ]
    if method is not None:
        kind = as_saliency_method(method)
        taken = {parameter.name for parameter in made}
        own = fields_as_flags(type(kind), Group(f"Hyperparameters of {kind.name}", sort_key=1))
        made += [parameter for parameter in own if parameter.name not in taken]
    return made


def run(model: str, image: str, **given: Any) -> None:
    from secateur.cli.shared import check_new_file, open_model, quiet_stdout, show
    from secateur.saliency import as_saliency_method, saliency
    from secateur.saliency.picture import read_picture

    if given["out"] is not None and Path(given["out"]).suffix.lower() != ".png":
        raise SecateurError(
            "the map is written as PNG", where=f"--out {given['out']}", fix="end the name in .png"
        )
    check_new_file(given["out"], "--out")
    if not Path(image).expanduser().is_file():
        raise SecateurError("no such picture", where=image, fix="check the path")
    fields = {item.name for item in dataclasses.fields(as_saliency_method(given["method"]))}
    settings = {name: given[name] for name in fields if name in given}
    if settings.get("weights"):
        settings["weights"] = tuple(numbers(settings["weights"], "--weights"))
    kind = as_saliency_method(given["method"], **settings)
    with quiet_stdout():
        network, _ = open_model(model, given)
        size, mean, std = reading_of(network, given)
        x, pixels = read_picture(image, size, mean, std)
        found = saliency(network, x, kind, given["target"], meta=given["meta"], blur=given["blur"])
        likely = likeliest(network, x)
        if given["out"]:
            found.save(given["out"], pixels)
            print(f"map: {given['out']}", file=sys.stderr)
    peak = divmod(int(found.values.argmax()), found.values.shape[1])
    value = {
        "model": model, "image": image, "method": found.method, "target": found.target, "layers": list(found.layers),
        "likeliest": likely, "peak": {"row": peak[0], "column": peak[1]}, "size": list(found.values.shape),
        "hyperparameters": found.hyperparameters, "out": given["out"],
    }  # fmt: skip
    show(value, given["json"], lambda console: draw(value, console))


def reading_of(network: Any, given: Any) -> tuple[tuple[int, int], list[float], list[float]]:
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
    if given["size"]:
        sides = [int(part) for part in re.findall(r"\d+", given["size"])]
        if not 1 <= len(sides) <= 2 or min(sides) < 1:
            raise SecateurError(f"{given['size']!r} is no size", where="--size", fix="such as 224,224")
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
    mean = numbers(given["mean"], "--mean") if given["mean"] else list(timm.get("mean", IMAGENET_MEAN))
    std = numbers(given["std"], "--std") if given["std"] else list(timm.get("std", IMAGENET_STD))
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


def likeliest(network: Any, x: Any, count: int = 5) -> list[dict[str, float]]:
    from secateur.saliency.record import record

    shares = record(network, x[None]).logits[0].float().softmax(0)
    top = shares.topk(min(count, len(shares)))
    return [{"class": int(c), "probability": round(float(p), 4)} for p, c in zip(*top)]


def draw(value: dict[str, Any], console: Any) -> None:
    console.print(f"[bold]{value['model']}[/bold]  {value['method']}  class {value['target']}")
    classes = "  ".join(f"{item['class']} ({item['probability']:.1%})" for item in value["likeliest"])
    console.print(f"likeliest classes: {classes}")
    if value["layers"]:
        console.print(f"layers: {', '.join(value['layers'])}")
    height, width = value["size"]
    console.print(
        f"strongest at row {value['peak']['row']}, column {value['peak']['column']} of {height} x {width}"
    )
    if value["out"] is None:
        console.print("--out map.png writes the picture")
