"""`secateur tokens`: one question about one picture, with every visual token and with those that a method keeps."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from secateur.cli.flags import OUTPUT, SWITCH, Settings, flag
from secateur.cli.shared import JSON_HELP, at_least, check_new_file, method_entry, quiet_stdout, show
from secateur.errors import SecateurError
from secateur.utils.spread import Speed

MODEL = Parameter(
    help="scenes, scenes:qwen, scenes:llava:1 (variant, seed), or a folder or hub name of a vision-language model"
)
PICTURE = Parameter(help="a picture file; or --image", show_default=False)
NUMBER, SIDE = 1000, 5
TIMES = ("seconds_to_first_token", "seconds_per_token")


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """The question, the method, and how both are run."""

    image: str | None = flag("a picture file, or the number of a test picture of scenes", None)
    prompt: str | None = flag("the question; default, for scenes: one about the picture", None)
    method: str = flag(
        "a method that drops tokens: `secateur methods --objects T` lists them, or file.py:Class", "divprune"
    )
    target: str = flag("what stays of the visual tokens: 25%, or tokens=64 a picture", "25%")
    positions: str | None = flag("original or compact; default: the method's", None)
    seed: int = flag("of what the method draws at random", 0)
    max_new_tokens: int = flag("length of the answer", 16)
    repeats: int = flag(
        "pairs of runs, with all tokens and with the kept ones in turn, that the times come from", 5
    )
    device: str = flag("cpu, cuda, cuda:1, mps, ...", "cpu")
    dtype: str | None = flag("float32, bfloat16 or float16; default: float32 on a cpu", None)
    out: Annotated[str | None, OUTPUT] = flag("a .png with the kept tokens over the picture", None)
    json: Annotated[bool, OUTPUT, SWITCH] = flag(JSON_HELP, False)


def token_method(name: str) -> dict[str, Any]:
    """The catalogue's entry of a method that drops tokens."""
    return method_entry(name, "tokens", "removes weights, not tokens")


@dataclass
class Asked:
    """A model with the inputs of one question, and what to show of them."""

    model: Any
    inputs: dict[str, Any]
    picture: Any
    prompt: str
    tokenizer: Any
    expected: str | None = None


def open_scene(name: str, image: str | None, flags: Tokens) -> Asked:
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
    model = model.to(flags.device, _dtype(flags.dtype))
    image = "0" if image is None else image
    if image.isdigit():
        if int(image) >= NUMBER:
            raise SecateurError(
                f"there is no test picture {image}", where="--image", fix=f"0 to {NUMBER - 1}"
            )
        pixels, known = picture(int(image))
        default = next((known[kind] for kind in ("where", "colour", "count") if kind in known), None)
        prompt = flags.prompt or (default or ("how many shapes ?", ""))[0]
        answers = {question: answer for question, answer in known.values()}
        expected = answers.get(" ".join(prompt.lower().replace("?", " ? ").split()))
    else:
        pixels, expected = read_picture(image, 64).permute(2, 0, 1), None
        prompt = flags.prompt or "how many circles ?"
    made = inputs(model, pixels[None], [encode(prompt)])
    return Asked(model, made, pixels.permute(1, 2, 0), prompt, scenes_tokenizer(), expected)


def open_any(name: str, image: str | None, flags: Tokens) -> Asked:
    """A model of `transformers` with its processor."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from secateur.io.reshape import BROKEN
    from secateur.io.transformers import quiet
    from secateur.io.trusted import check_folder
    from secateur.tasks.models import model_folder

    if image is None or flags.prompt is None:
        what = "a picture" if image is None else "a question"
        raise SecateurError(
            f"needs {what}", where="tokens", fix='secateur tokens MODEL photo.jpg --prompt "..."'
        )
    pixels = read_picture(image)
    folder = model_folder(name)
    try:
        with quiet():
            check_folder(folder)
            processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
            model = AutoModelForImageTextToText.from_pretrained(
                folder, dtype=_dtype(flags.dtype), trust_remote_code=False, use_safetensors=True
            )
    except (*BROKEN, OSError, ImportError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise SecateurError(
            f"can't be opened as a vision-language model ({reason})",
            where=name,
            fix="give a folder that save_pretrained wrote with its processor, or scenes",
        ) from error
    model = model.to(flags.device).eval()  # type: ignore[arg-type]
    text = flags.prompt
    if getattr(processor, "chat_template", None):
        content = [{"type": "image"}, {"type": "text", "text": text}]
        text = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
    elif (mark := getattr(processor, "image_token", None)) and mark not in text:
        text = f"{mark}\n{text}"
    from PIL import Image

    made = processor(images=Image.fromarray(pixels.numpy()), text=text, return_tensors="pt").to(flags.device)
    if "pixel_values" in made:
        made["pixel_values"] = made["pixel_values"].to(next(model.parameters()).dtype)
    return Asked(model, dict(made), pixels, flags.prompt, processor.tokenizer)


def read_picture(path: str, size: int | None = None) -> Any:
    """A picture file as uint8 [H, W, 3], resized to a square of `size`."""
    import torch

    from secateur.utils.pictures import open_picture

    image = open_picture(path)
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


def timed(asked: Asked, length: int) -> tuple[str, float, float | None]:
    """The answer, the seconds to its first token, and the median seconds for each after it."""
    import torch

    prompt, watch = asked.inputs["input_ids"].shape[1], Stopwatch(asked.model)
    with torch.no_grad():
        written = asked.model.generate(**asked.inputs, max_new_tokens=length, do_sample=False, streamer=watch)
    answer = asked.tokenizer.decode(written[0, prompt:], skip_special_tokens=True).strip()
    each = [b - a for a, b in zip(watch.marks[1:], watch.marks[2:])]
    return answer, watch.marks[1] - watch.begun, statistics.median(each) if each else None


def tokens(
    model: Annotated[str, MODEL],
    picture: Annotated[str | None, PICTURE] = None,
    /,
    *,
    flags: Tokens,
    settings: Settings,
) -> None:
    """Ask a vision-language model about a picture, with all of its visual tokens and with some dropped.

    `secateur tokens scenes --image 3` needs no files. With --method NAME, --help shows the method's hyperparameters too.
    """
    from secateur.report.tokens import print_tokens

    if flags.out is not None and not flags.out.lower().endswith(".png"):
        raise SecateurError("the drawing is a .png", where="--out", fix="such as kept.png")
    check_new_file(flags.out, "--out")
    at_least("--max-new-tokens", flags.max_new_tokens, 1)
    at_least("--repeats", flags.repeats, 1)
    method = token_method(flags.method)["name"]
    with quiet_stdout():
        scene = model.split(":")[0] == "scenes" or (Path(model).expanduser() / "scenes.json").is_file()
        image = flags.image if picture is None else picture
        asked = (open_scene if scene else open_any)(model, image, flags)
        report = compare(asked, method, vars(settings), model, flags)
    show(report, flags.json, lambda console: print_tokens(report, console))


def compare(
    asked: Asked, method: str, settings: Mapping[str, Any], name: str, flags: Tokens
) -> dict[str, Any]:
    """The answers and figures of both runs; draws the kept tokens where --out says."""
    from secateur.measure.load import Others
    from secateur.measure.timing import summed
    from secateur.report.tokens import token_alarms
    from secateur.tokens.attach import attach

    runs: dict[str, list[tuple[str, float, float | None]]] = {"before": [], "after": []}
    others = Others()
    for _ in range(flags.repeats + (flags.repeats > 1)):  # in turn; the first pair warms up
        runs["before"].append(timed(asked, flags.max_new_tokens))
        with attach(
            asked.model,
            flags.method,
            target=flags.target,
            seed=flags.seed,
            positions=flags.positions,
            tokenizer=asked.tokenizer,
            question=asked.prompt,
            **settings,
        ) as attached:
            runs["after"].append(timed(asked, flags.max_new_tokens))
            report = attached.report
            stages = {stage: attached.coordinates(stage)[0] for stage in attached.kept}
            shape = _grid(attached)
    used = others.used()
    figures = ("visual_tokens", "tokens_x_layers", "equivalent_tokens", "flops", "kv_bytes")
    found: dict[str, Any] = {
        "model": name,
        "method": method,
        "target": flags.target,
        "prompt": asked.prompt,
        "expected": asked.expected,
        "convention": report.get("convention"),
        "kept": {stage: attached.kept[stage][0].tolist() for stage in stages},
        "out": flags.out,
    }
    seconds: dict[str, dict[str, list[float]]] = {}
    for side, made in runs.items():
        counted = report.get(side) or {}
        columns = zip(TIMES, zip(*(times for _, *times in made[flags.repeats > 1 :])))
        seconds[side] = {key: list(values) for key, values in columns if None not in values}
        latency = summed(seconds[side], used)
        found[side] = {"answer": made[-1][0]} | {key: counted.get(key) for key in figures}
        found[side] |= {key: latency.pop(key, None) for key in TIMES}
        found[side]["latency"] = latency
    found["speed"] = {
        key: Speed.of(seconds["before"][key], seconds["after"][key]).as_dict()
        for key in TIMES
        if key in seconds["before"] and key in seconds["after"]
    }
    found["collapsed"] = token_alarms(found)
    found["not_measured"] = {
        key: "the answer is a single token"
        if key == "seconds_per_token"
        else f"{type(asked.model).__name__} counts none"
        for side in ("before", "after")
        for key, value in found[side].items()
        if value is None
    }
    if flags.out:
        draw(asked.picture, stages, shape, Path(flags.out).expanduser())
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
