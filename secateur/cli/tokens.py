"""`secateur tokens`: one question about pictures or a video, with every visual token and with those that a method keeps."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
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
PICTURES = Parameter(
    help="picture files, in the order in which the question follows them; or --image, or --video",
    show_default=False,
)
NUMBER, SIDE = 1000, 5
STILLS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
TIMES = ("seconds_to_first_token", "seconds_per_token")


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """The question, the method, and how both are run."""

    image: str | None = flag("a picture file, or the number of a test picture of scenes", None)
    video: str | None = flag("a folder of pictures, a frame each, or an animated .gif or .webp", None)
    frames: int = flag("of the video, at even distances", 8)
    prompt: str | None = flag("the question; default, for scenes: one about the picture", None)
    method: str = flag(
        "a method that drops tokens: `secateur methods --objects T` lists them, or file.py:Class", "divprune"
    )
    target: str = flag("what stays of the visual tokens: 25%, or tokens=64 a picture", "25%")
    budget: str | None = flag(
        "what the target is of: each frame, each image, or all pictures together; default: the method's", None
    )
    weights: str | None = flag(
        "the folder that `secateur train tokens` wrote, for a method with modules", None
    )
    work: str | None = flag(
        "a file of what visual tokens take part in, beside a method or, with yopo, in place of its own plan",
        None,
    )
    positions: str | None = flag("original or compact; default: the method's", None)
    seed: int = flag("of what the method draws at random", 0)
    max_new_tokens: int = flag("length of the answer", 16)
    repeats: int = flag(
        "pairs of runs, with all tokens and with the kept ones in turn, that the times come from", 5
    )
    device: str = flag("cpu, cuda, cuda:1, mps, ...", "cpu")
    dtype: str | None = flag("float32, bfloat16 or float16; default: float32 on a cpu", None)
    out: Annotated[str | None, OUTPUT] = flag("a .png with the kept tokens over each picture and frame", None)
    json: Annotated[bool, OUTPUT, SWITCH] = flag(JSON_HELP, False)


def token_method(name: str) -> dict[str, Any]:
    """The catalogue's entry of a method that drops tokens."""
    return method_entry(name, "tokens", "removes no visual tokens")


@dataclass
class Asked:
    """A model with the inputs of one question, and what to show of them."""

    model: Any
    inputs: dict[str, Any]
    pictures: list[Any]
    """uint8 [H, W, 3] of each image, [frames, H, W, 3] of a video."""
    prompt: str
    tokenizer: Any
    expected: str | None = None


def is_scene(name: str) -> bool:
    return name.split(":")[0] == "scenes" or (Path(name).expanduser() / "scenes.json").is_file()


def scene_model(name: str, device: str, dtype: str | None) -> Any:
    """`scenes`, `scenes:VARIANT`, `scenes:VARIANT:SEED`, or a folder that `train scenes` wrote."""
    from secateur.tasks.scenes.models import VARIANTS, load_scenes

    if name.startswith("scenes") and not Path(name).is_dir():
        _, _, rest = name.partition(":")
        variant, _, seed = rest.partition(":")
        variant = variant or "llava"
        if variant not in VARIANTS or not (seed or "0").isdigit():
            raise SecateurError(f"no model is called {name!r}", where="model", fix="such as scenes:llava:0")
        model = load_scenes(variant, int(seed or 0))
    else:
        model = load_scenes(name)
    return model.to(device, _dtype(dtype))


def open_scene(name: str, images: Sequence[str], flags: Tokens) -> Asked:
    """A question about test pictures of scenes, or picture files."""
    import torch

    from secateur.tasks.scenes.draw import encode
    from secateur.tasks.scenes.evaluate import picture
    from secateur.tasks.scenes.models import inputs, scenes_tokenizer

    if flags.video is not None:
        raise SecateurError("scenes are stills", where="--video", fix="give pictures, or another model")
    model = scene_model(name, flags.device, flags.dtype)
    shown, expected, prompt = [], None, flags.prompt
    for image in images or ["0"]:
        if not image.isdigit():
            shown.append(read_picture(image, 64))
            prompt, expected = prompt or "how many circles ?", None
            continue
        if int(image) >= NUMBER:
            raise SecateurError(
                f"there is no test picture {image}", where="--image", fix=f"0 to {NUMBER - 1}"
            )
        pixels, known = picture(int(image))
        shown.append(pixels.permute(1, 2, 0))
        # the question is about the last picture
        default = next((known[kind] for kind in ("where", "colour", "count") if kind in known), None)
        asked = flags.prompt or (default or ("how many shapes ?", ""))[0]
        answers = {question: answer for question, answer in known.values()}
        prompt, expected = asked, answers.get(" ".join(asked.lower().replace("?", " ? ").split()))
    assert prompt is not None
    together = torch.stack([one.permute(2, 0, 1) for one in shown])[None]
    return Asked(
        model, inputs(model, together, [encode(prompt)]), shown, prompt, scenes_tokenizer(), expected
    )


def any_model(name: str, device: str, dtype: str | None) -> tuple[Any, Any]:
    """A model of `transformers`, and its processor."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from secateur.io.reshape import BROKEN
    from secateur.io.transformers import quiet
    from secateur.io.trusted import check_folder
    from secateur.tasks.models import model_folder

    folder = model_folder(name)
    try:
        with quiet():
            check_folder(folder)
            processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
            model = AutoModelForImageTextToText.from_pretrained(
                folder, dtype=_dtype(dtype), trust_remote_code=False, use_safetensors=True
            )
    except (*BROKEN, OSError, ImportError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise SecateurError(
            f"can't be opened as a vision-language model ({reason})",
            where=name,
            fix="give a folder that save_pretrained wrote with its processor, or scenes",
        ) from error
    return model.to(device).eval(), processor  # type: ignore[arg-type]


def as_prompt(processor: Any, text: str, kinds: Sequence[str] = ("image",)) -> str:
    """A question about pictures (or a "video") as the model was taught to read it."""
    if getattr(processor, "chat_template", None):
        content = [*({"type": kind} for kind in kinds), {"type": "text", "text": text}]
        return processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
    marks = [getattr(processor, f"{kind}_token", None) for kind in kinds]
    return "\n".join([*(mark for mark in marks if mark and mark not in text), text])


def open_any(name: str, images: Sequence[str], flags: Tokens) -> Asked:
    """A question to a model of `transformers`."""
    if not images and flags.video is None or flags.prompt is None:
        what = "a question" if images or flags.video is not None else "a picture"
        raise SecateurError(
            f"needs {what}", where="tokens", fix='secateur tokens MODEL photo.jpg --prompt "..."'
        )
    shown = [read_picture(image) for image in images]
    video = None if flags.video is None else read_video(flags.video, flags.frames)
    model, processor = any_model(name, flags.device, flags.dtype)
    kinds = ["image"] * len(shown) + ["video"] * (video is not None)
    if video is not None and getattr(processor, "video_processor", None) is None:
        raise SecateurError(
            "this model's processor reads no videos", where="--video", fix="give its frames as pictures"
        )
    text = as_prompt(processor, flags.prompt, kinds)
    from PIL import Image

    given: dict[str, Any] = {"text": text, "return_tensors": "pt"}
    if shown:
        given["images"] = [Image.fromarray(one.numpy()) for one in shown]
    if video is not None:
        given |= {"videos": [video.permute(0, 3, 1, 2)], "videos_kwargs": {"do_sample_frames": False}}
    made = processor(**given).to(flags.device)
    for key in ("pixel_values", "pixel_values_videos"):
        if key in made:
            made[key] = made[key].to(next(model.parameters()).dtype)
    pictures = [*shown, *([] if video is None else [video])]
    return Asked(model, dict(made), pictures, flags.prompt, processor.tokenizer)


def read_picture(path: str, size: int | None = None) -> Any:
    """A picture file as uint8 [H, W, 3], resized to a square of `size`."""
    import torch

    from secateur.utils.pictures import open_picture

    image = open_picture(path)
    if size is not None:
        image = image.resize((size, size))
    data = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return data.view(image.height, image.width, 3)


def read_video(path: str, frames: int) -> Any:
    """A folder of pictures of one size, or an animated picture, as uint8 [frames, H, W, 3]: so many at even distances."""
    import torch

    from secateur.utils.pictures import open_frames

    at_least("--frames", frames, 1)
    files = Path(path).expanduser()
    if files.is_dir():
        names = sorted(file for file in files.iterdir() if file.suffix.lower() in STILLS)
        found = [read_picture(str(names[i])) for i in spread(len(names), frames)]
    elif files.is_file() and files.suffix.lower() not in (".gif", ".webp"):
        raise SecateurError(
            "only a folder of pictures or an animated .gif or .webp is read as a video",
            where=path,
            fix="ffmpeg -i clip.mp4 -r 2 frames/%03d.png, and give the folder",
        )
    else:
        moving = open_frames(path)
        pictures = [moving[i] for i in spread(len(moving), frames)]
        found = [
            torch.frombuffer(bytearray(p.tobytes()), dtype=torch.uint8).view(p.height, p.width, 3)
            for p in pictures
        ]
    if not found:
        raise SecateurError("no pictures are in it", where=path, fix=f"files that end in {', '.join(STILLS)}")
    if len({tuple(frame.shape) for frame in found}) > 1:
        raise SecateurError("its frames have different sizes", where=path, fix="make them one size")
    return torch.stack(found)


def spread(count: int, most: int) -> list[int]:
    """`most` of the numbers below `count` at even distances, all where there are fewer.

    >>> spread(10, 4), spread(2, 8)
    ([1, 3, 6, 8], [0, 1])
    """
    most = min(count, most)
    return [(2 * i + 1) * count // (2 * most) for i in range(most)]


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
    /,
    *pictures: Annotated[str, PICTURES],
    flags: Tokens,
    settings: Settings,
) -> None:
    """Ask a vision-language model about pictures or a video, with all of the visual tokens and with some dropped.

    `secateur tokens scenes --image 3` needs no files, nor does `secateur tokens scenes 3 5 --budget all`. With --method NAME, --help shows the method's hyperparameters too.
    """
    from secateur.report.tokens import print_tokens

    if flags.out is not None and not flags.out.lower().endswith(".png"):
        raise SecateurError("the drawing is a .png", where="--out", fix="such as kept.png")
    check_new_file(flags.out, "--out")
    at_least("--max-new-tokens", flags.max_new_tokens, 1)
    at_least("--repeats", flags.repeats, 1)
    method = token_method(flags.method)["name"]
    with quiet_stdout():
        images = pictures or (() if flags.image is None else (flags.image,))
        asked = (open_scene if is_scene(model) else open_any)(model, images, flags)
        given = vars(settings)
        if (
            flags.weights is not None or flags.work is not None
        ):  # what isn't said is as it was trained, or planned
            default = {item.name: item.default for item in dataclasses.fields(settings)}  # type: ignore[arg-type]
            given = {name: value for name, value in given.items() if value != default[name]}
        report = compare(asked, method, given, model, flags)
    show(report, flags.json, lambda console: print_tokens(report, console))


def compare(
    asked: Asked, method: str, settings: Mapping[str, Any], name: str, flags: Tokens
) -> dict[str, Any]:
    """The answers and figures of both runs; draws the kept tokens where --out says."""
    from secateur.measure.load import Others
    from secateur.measure.timing import summed
    from secateur.method import method_class
    from secateur.report.tokens import kept_sheet, parts_kept, token_alarms
    from secateur.saliency.picture import save_png
    from secateur.tokens.attach import attach
    from secateur.tokens.method import WorkMethod

    cls = method_class(flags.method)
    planned = (
        issubclass(cls, WorkMethod)
        and flags.target == Tokens.target
        and (flags.work is not None or any(settings.get(name) != getattr(cls, name) for name in cls.instead))
    )
    runs: dict[str, list[tuple[str, float, float | None]]] = {"before": [], "after": []}
    others = Others()
    for _ in range(flags.repeats + (flags.repeats > 1)):  # in turn; the first pair warms up
        runs["before"].append(timed(asked, flags.max_new_tokens))
        with attach(
            asked.model,
            flags.method,
            target=None if planned else flags.target,
            seed=flags.seed,
            positions=flags.positions,
            budget=flags.budget,
            tokenizer=asked.tokenizer,
            question=asked.prompt,
            weights=flags.weights,
            work=flags.work,
            **settings,
        ) as attached:
            runs["after"].append(timed(asked, flags.max_new_tokens))
            report = attached.report
            kept = {stage: rows[0].tolist() for stage, rows in attached.kept.items()}
            counts = {stage: attached.counts(stage)[0] for stage in kept}
            parts = {stage: parts_kept(attached, stage) for stage in list(kept)[:SIDE]}
    used = others.used()
    figures = ("visual_tokens", "tokens_x_layers", "equivalent_tokens", "flops", "kv_bytes")
    found: dict[str, Any] = {
        "model": name,
        "method": method,
        "target": flags.target,
        "prompt": asked.prompt,
        "expected": asked.expected,
        "convention": report.get("convention"),
        "budget": flags.budget,
        "visual_flops": report.get("visual_flops"),
        "kept": kept,
        "pictures": counts,
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
        save_png(kept_sheet(asked.pictures, parts), Path(flags.out).expanduser())
    return found
