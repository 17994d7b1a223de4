"""`secateur tokens`: one question about one picture, with every visual token and with those that a method keeps."""

from __future__ import annotations

import dataclasses
import inspect
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cyclopts import Group

from secateur.cli.flags import fields_as_flags, flag, in_group, own_flag, word
from secateur.errors import SecateurError

MODEL = (
    "scenes, scenes:qwen, scenes:llava:1 (variant, seed), or a folder or hub name of a vision-language model"
)
TEXT = """Ask a vision-language model about a picture, with all of its visual tokens and with some dropped.

`secateur tokens scenes --image 3` needs no files. With --method NAME, --help shows the method's hyperparameters too."""
NUMBER, SIDE = 1000, 5


def parameters(method: str | None, json: inspect.Parameter) -> list[inspect.Parameter]:
    """Flags of `tokens`; with a method's name, its hyperparameters too."""
    output = Group("Output", sort_key=4)
    made = [
        word("model", help=MODEL),
        word("picture", str | None, None, help="a picture file; or --image"),
        flag("image", str | None, None, "a picture file, or the number of a test picture of scenes"),
        flag("prompt", str | None, None, "the question; default, for scenes: one about the picture"),
        flag(
            "method", str, "divprune", "a method that drops tokens: `secateur methods --objects T` lists them"
        ),
        flag("target", str, "25%", "what stays of the visual tokens: 25%, or tokens=64 a picture"),
        flag("positions", str | None, None, "original or compact; default: the method's"),
        flag("seed", int, 0, "of what the method draws by chance"),
        flag("max_new_tokens", int, 16, "length of the answer"),
        flag("repeats", int, 3, "runs that the times are the median of"),
        flag("device", str, "cpu", "cpu, cuda, cuda:1, mps, ..."),
        flag("dtype", str | None, None, "float32, bfloat16 or float16; default: float32 on a cpu"),
    ]
    if method is not None:
        cls = _class(method)
        taken = {parameter.name for parameter in made} | {"out", "json"}
        group = Group(f"Hyperparameters of {cls.name}", sort_key=1)
        made += fields_as_flags(cls, group, lambda field: own_flag(cls.name, field, taken))
    made += [
        flag("out", str | None, None, "a .png with the kept tokens over the picture", output),
        in_group(json, output),
    ]
    return made


def _class(method: str) -> Any:
    from secateur.method import list_methods, method_class
    from secateur.tokens.method import TokenMethod

    cls = method_class(method)
    if not issubclass(cls, TokenMethod):
        known = [name for name in list_methods() if issubclass(method_class(name), TokenMethod)]
        raise SecateurError(
            f"{cls.name} removes weights, not tokens", where="--method", fix=f"one of {', '.join(known)}"
        )
    return cls


@dataclasses.dataclass
class Asked:
    """A model with the inputs of one question, and what to show of them."""

    model: Any
    inputs: dict[str, Any]
    picture: Any
    prompt: str
    tokenizer: Any
    expected: str | None = None


def open_scene(name: str, given: Mapping[str, Any]) -> Asked:
    """`scenes`, `scenes:VARIANT`, `scenes:VARIANT:SEED`, or a folder that `train scenes` wrote."""
    from secateur.tasks.scenes.draw import encode
    from secateur.tasks.scenes.evaluate import picture
    from secateur.tasks.scenes.models import VARIANTS, inputs, load_scenes, scenes_tokenizer

    if name.startswith("scenes") and not Path(name).is_dir():
        _, _, rest = name.partition(":")
        variant, _, seed = rest.partition(":")
        variant = variant or "llava"
        if variant not in VARIANTS or not (seed or "0").isdigit():
            raise SecateurError(f"no model is called {name!r}", where="model", fix="such as scenes:llava:0")
        model = load_scenes(variant, int(seed or 0))
    else:
        model = load_scenes(name)
    model = model.to(given["device"], _dtype(given["dtype"]))
    image = given["picture"] if given["picture"] is not None else given["image"]
    image = "0" if image is None else image
    if image.isdigit():
        if int(image) >= NUMBER:
            raise SecateurError(
                f"there is no test picture {image}", where="--image", fix=f"0 to {NUMBER - 1}"
            )
        pixels, known = picture(int(image))
        default = next((known[kind] for kind in ("where", "colour", "count") if kind in known), None)
        prompt = given["prompt"] or (default or ("how many shapes ?", ""))[0]
        answers = {question: answer for question, answer in known.values()}
        expected = answers.get(" ".join(prompt.lower().replace("?", " ? ").split()))
    else:
        pixels, expected = read_picture(image, 64).permute(2, 0, 1), None
        prompt = given["prompt"] or "how many circles ?"
    made = inputs(model, pixels[None], [encode(prompt)])
    return Asked(model, made, pixels.permute(1, 2, 0), prompt, scenes_tokenizer(), expected)


def open_any(name: str, given: Mapping[str, Any]) -> Asked:
    """A model of `transformers` with its processor."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from secateur.io.transformers import quiet

    image = given["picture"] if given["picture"] is not None else given["image"]
    if image is None or given["prompt"] is None:
        what = "a picture" if image is None else "a question"
        raise SecateurError(
            f"needs {what}", where="tokens", fix='secateur tokens MODEL photo.jpg --prompt "..."'
        )
    pixels = read_picture(image)
    try:
        with quiet():
            processor = AutoProcessor.from_pretrained(name)
            model = AutoModelForImageTextToText.from_pretrained(name, dtype=_dtype(given["dtype"]))
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise SecateurError(
            f"can't be opened as a vision-language model ({reason})",
            where=name,
            fix="give a folder that save_pretrained wrote with its processor, or scenes",
        ) from error
    model = model.to(given["device"]).eval()
    text = given["prompt"]
    if getattr(processor, "chat_template", None):
        content = [{"type": "image"}, {"type": "text", "text": text}]
        text = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
    elif (mark := getattr(processor, "image_token", None)) and mark not in text:
        text = f"{mark}\n{text}"
    from PIL import Image

    made = processor(images=Image.fromarray(pixels.numpy()), text=text, return_tensors="pt").to(
        given["device"]
    )
    if "pixel_values" in made:
        made["pixel_values"] = made["pixel_values"].to(next(model.parameters()).dtype)
    return Asked(model, dict(made), pixels, given["prompt"], processor.tokenizer)


def read_picture(path: str, size: int | None = None) -> Any:
    """A picture file as uint8 [H, W, 3], resized to a square of `size`."""
    import torch

    from secateur.saliency.picture import _pillow

    try:
        image = _pillow().open(Path(path).expanduser()).convert("RGB")
    except (OSError, ValueError) as error:
        raise SecateurError(
            f"isn't a picture that can be read ({error})", where=path, fix="a .png or .jpg"
        ) from error
    if size is not None:
        image = image.resize((size, size))
    data = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return data.view(image.height, image.width, 3)


def _dtype(name: str | None) -> Any:
    import torch

    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name is not None and name not in known:
        raise SecateurError(f"{name!r} isn't a dtype", where="--dtype", fix="float32, bfloat16 or float16")
    return known[name or "float32"]


class Stopwatch:
    """A streamer that notes when each token comes; the prompt comes first."""

    def __init__(self, model: Any) -> None:
        from secateur.tokens.cost import Clock

        self.now = lambda: Clock._now(model)
        self.begun, self.marks = self.now(), []  # type: tuple[float, list[float]]

    def put(self, value: Any) -> None:
        self.marks.append(self.now())

    def end(self) -> None:
        pass


def timed(asked: Asked, length: int, repeats: int) -> tuple[str, float, float | None]:
    """The answer, and the median seconds to its first token and for each after it."""
    import torch

    first, each, answer = [], [], ""
    prompt = asked.inputs["input_ids"].shape[1]
    for _ in range(repeats):
        watch = Stopwatch(asked.model)
        with torch.no_grad():
            written = asked.model.generate(
                **asked.inputs, max_new_tokens=length, do_sample=False, streamer=watch
            )
        answer = asked.tokenizer.decode(written[0, prompt:], skip_special_tokens=True).strip()
        first.append(watch.marks[1] - watch.begun)
        each += [b - a for a, b in zip(watch.marks[1:], watch.marks[2:])]
    return answer, statistics.median(first), statistics.median(each) if each else None


def run(model: str, picture: str | None = None, **given: Any) -> None:
    from secateur.cli.shared import check_new_file, quiet_stdout, show
    from secateur.report.tokens import print_tokens

    given["picture"] = picture
    if given["out"] is not None and not given["out"].lower().endswith(".png"):
        raise SecateurError("the drawing is a .png", where="--out", fix="such as kept.png")
    check_new_file(given["out"], "--out")
    for name in ("max_new_tokens", "repeats"):
        if given[name] < 1:
            raise SecateurError(f"{given[name]} is less than 1", where=f"--{name.replace('_', '-')}")
    cls = _class(given["method"])
    with quiet_stdout():
        scene = model.split(":")[0] == "scenes" or (Path(model).expanduser() / "scenes.json").is_file()
        asked = (open_scene if scene else open_any)(model, given)
        found = compare(asked, cls, model, given)
    show(found, given["json"], lambda console: print_tokens(found, console))


def compare(asked: Asked, cls: Any, name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The answers and figures of both runs; draws the kept tokens where --out says."""
    import secateur

    names = [item.name for item in dataclasses.fields(cls) if item.init]
    taken = {parameter.name for parameter in parameters(None, flag("json", bool, False))}
    settings = {
        n: given[own_flag(cls.name, n, taken)] for n in names if own_flag(cls.name, n, taken) in given
    }
    length, repeats = given["max_new_tokens"], given["repeats"]
    before_answer, *before_times = timed(asked, length, repeats)
    with secateur.attach(
        asked.model,
        cls,
        target=given["target"],
        seed=given["seed"],
        positions=given["positions"],
        tokenizer=asked.tokenizer,
        question=asked.prompt,
        **settings,
    ) as attached:
        after_answer, *after_times = timed(asked, length, repeats)
        report = attached.report
        stages = {stage: attached.coordinates(stage)[0] for stage in attached.kept}
        shape = _grid(attached)
    figures = ("visual_tokens", "tokens_x_layers", "equivalent_tokens", "flops", "kv_bytes")
    found: dict[str, Any] = {
        "model": name,
        "method": cls.name,
        "target": given["target"],
        "prompt": asked.prompt,
        "expected": asked.expected,
        "convention": report.get("convention"),
        "kept": {stage: attached.kept[stage][0].tolist() for stage in stages},
        "out": given["out"],
    }
    for side, answer, times in (
        ("before", before_answer, before_times),
        ("after", after_answer, after_times),
    ):
        counted = report.get(side) or {}
        found[side] = {"answer": answer} | {key: counted.get(key) for key in figures}
        found[side] |= dict(zip(("seconds_to_first_token", "seconds_per_token"), times))
    found["not_measured"] = {
        key: "the answer is a single token"
        if key == "seconds_per_token"
        else f"{type(asked.model).__name__} counts none"
        for side in ("before", "after")
        for key, value in found[side].items()
        if value is None
    }
    if given["out"]:
        draw(asked.picture, stages, shape, Path(given["out"]).expanduser())
    return found


def _grid(attached: Any) -> tuple[int, int]:
    """Rows and columns of the first crop."""
    table = attached.table
    first = table.crop == table.crop[: table.visual].min()
    return int(table.grid_row[first].max()) + 1, int(table.grid_col[first].max()) + 1


def draw(picture: Any, stages: Mapping[str, Any], shape: tuple[int, int], out: Path) -> None:
    """The picture, and beside it what each stage kept."""
    from secateur.report.tokens import draw_kept, enlarge, grids, sheet
    from secateur.saliency.picture import save_png

    total = shape[0] * shape[1]
    panels = []
    for stage, coordinates in list(stages.items())[:SIDE]:
        kept = grids(coordinates, shape)
        panels.append((draw_kept(picture, kept), f"{stage}: {int(kept.sum())} of {total} tokens"))
    panels = (
        [(enlarge(picture, panels[0][0]), "the picture"), *panels] if panels else [(picture, "the picture")]
    )
    save_png(sheet(panels), out)
