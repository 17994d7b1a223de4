"""What the verbs of the command line share: flags, checks before the work starts, models, output."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Group, Parameter

from secateur.cli.flags import SWITCH, flag, listed, settings
from secateur.errors import SecateurError, choose, require
from secateur.taxonomy import catalogue as data
from secateur.utils.code import announced, read_spec
from secateur.utils.files import check_path

MODEL = Parameter(
    help="smollm2, aidreams, a task or its network (cifar10, resnet56, vdsr, espnet, ...), a folder that transformers,"
    " diffusers or secateur wrote, an .onnx or .pt2 file, or a hub name"
)
OUT_HELP = "a new folder for the result, or a new .onnx, .pt2 or (for llama.cpp) .gguf file"
REPORT_HELP = "a self-contained HTML file with the report"
DEVICE_HELP = "cpu, cuda, cuda:1, mps, ...; default: cpu"
RESUME_HELP = "go on with the unfinished run of the same command, in OUT.run"
JSON_HELP = "print one JSON object, and nothing else, on stdout"
PLAN = Parameter(help="a folder that holds a plan.json, or the file")
MEASUREMENT = Parameter(group=Group("Measurement", sort_key=3))
TASKS_HELP = (
    "measure quality on these, separated by commas: texts (perplexity: wikitext2, ptb, a file, hf:NAME:SPLIT:FIELD), sets of questions"
    " (accuracy: piqa, arc_easy, ...; lm-eval:NAME as lm-evaluation-harness scores it) and of pictures and phrases (cifar10, digits, camvid, sst2; PSNR: set5, set14)"
)
LIMIT_HELP = "at most this many windows of a text and questions of a set"
ALSO_HELP = (
    "another example input, which takes another branch of the model: a shape as for --input-shape, or a .safetensors file"
    " with the inputs of forward by name; may be repeated"
)
LATENCY_HELP = "measure the time of a forward, and of a new token; before and after run in turn"


@dataclass(frozen=True, kw_only=True)
class Shown:
    """How the result is shown."""

    json: Annotated[bool, SWITCH] = flag(JSON_HELP, False)


@dataclass(frozen=True, kw_only=True)
class Where:
    """The model's example input, its device and its dtype."""

    input_shape: str | None = flag(
        "shape of the example input of a model that reads pictures or of a file, such as 1,3,224,224; for several inputs"
        " name:1,16;other:1,16; or a .safetensors file with the inputs of forward by name",
        None,
    )
    device: str | None = flag(DEVICE_HELP, None)
    dtype: str | None = flag("float32, bfloat16 or float16; default: float32 where it fits on a cpu", None)


@dataclass(frozen=True, kw_only=True)
class Quality:
    """What is measured before and after."""

    tasks: Annotated[str | None, MEASUREMENT] = flag(TASKS_HELP, None)
    limit: Annotated[int | None, MEASUREMENT] = flag(LIMIT_HELP, None)

    def check(self) -> None:
        """Refuse unknown tasks and impossible sizes before any work is done."""
        from secateur.data import choices, hub, text
        from secateur.measure import SEEN, harness

        known = [*text.NAMES, *choices.SETS, *SEEN]
        fix = f"give a text file, {hub.PREFIX}NAME:SPLIT:FIELD, {harness.PREFIX}NAME, or one of {', '.join(known)}"
        for task in listed(self.tasks):
            if not task.startswith((hub.PREFIX, harness.PREFIX)) and not Path(task).expanduser().is_file():
                choose(task, known, what="task", where="--tasks", near=1, cutoff=0.6, fix=fix)
        at_least("--limit", self.limit, 1)

    @property
    def asked(self) -> dict[str, Any]:
        """The keywords of `measure`."""
        return {"tasks": listed(self.tasks), "limit": self.limit}


def at_least(name: str, value: int | None, least: int) -> None:
    """Refuse a number that is too small."""
    enough = value is None or value >= least
    require(enough, f"{value} is too few", where=name, fix=f"give {least} or more")


# ---------------------------------------------------------------- methods


@functools.cache
def entries() -> Mapping[str, dict[str, Any]]:
    """The catalogue's methods and those of installed packages; read off the code where a file was added since it was written."""
    folder = Path(__file__).parents[1] / "methods"
    known = data.catalogue()["methods"]
    files = {entry.get("file", name.replace("-", "_")) for name, entry in known.items()}
    if files != {path.stem for path in folder.glob("[!_]*.py")}:
        from secateur.report.catalogue import catalogue

        known = catalogue()["methods"]
    if not announced("secateur.methods"):  # nothing is imported to find that there is none
        return known
    from secateur.method import method_class, plugins
    from secateur.report.catalogue import entry

    return dict(sorted({**known, **{name: entry(method_class(name)) for name in plugins()}}.items()))


def method_entry(name: str, verb: str | None = None, other: str = "", fix: str = "") -> dict[str, Any]:
    """The catalogue's entry of a method; `file.py:Class` is run.

    Raises SecateurError with the nearest names for another name, and for a method of another verb.
    """
    if read_spec(name):
        from secateur.method import method_class
        from secateur.report.catalogue import entry

        cls = method_class(name)
        found = {"name": cls.name, **entry(cls)}
    else:
        known = entries()
        key = name.strip().lower().replace("_", "-")
        fix_ = "`secateur methods` lists them"
        choose(key, known, where="method", error=f"there is no method {name!r}", near=3, fix=fix_)
        found = {"name": key, **known[key]}
    if verb and found["verb"] != verb:
        what = f"{found['name']} {other}"
        raise SecateurError(what, where="--method", fix=f"{fix}one of {', '.join(methods_of(verb))}")
    return found


def methods_of(verb: str) -> list[str]:
    """The names of a verb's methods."""
    return [name for name, entry in entries().items() if entry["verb"] == verb]


def method_flags(entry: Mapping[str, Any], taken: set[str], optional: bool = False) -> type:
    """The hyperparameters of a method as flags; with its name before one that a general flag has too.

    optional: what isn't given is None.
    """
    name, rows = entry["name"], entry["settings"]
    return settings(rows, f"Hyperparameters of {name}", prefix=name, taken=taken, optional=optional)


# ---------------------------------------------------------------- output


def show(value: Mapping[str, Any], as_json: bool, draw: Callable[[Any], None]) -> None:
    """The result on stdout: JSON, or what `draw` prints on a console."""
    from rich.console import Console

    if as_json:
        print(json.dumps(plain(value), ensure_ascii=False), file=sys.stdout, flush=True)
    else:
        draw(Console(highlight=False, soft_wrap=not sys.stdout.isatty()))


def plain(value: Any) -> Any:
    """`value` with what JSON can hold: infinities and NaN are null, sets are sorted lists, paths are text."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(map(plain, value))
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    return value if value is None or isinstance(value, bool | int | str) else str(value)


@contextlib.contextmanager
def quiet_stdout() -> Iterator[None]:
    """What libraries print goes to stderr: stdout belongs to the result."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


def check_new_folder(path: str | None, name: str = "--out") -> None:
    """Refuse a folder that is in use, or an .onnx or .pt2 file that exists, before any work is done."""
    if path is None:
        return
    from secateur.io.exchange import check_packages, is_exchange
    from secateur.io.gguf import is_gguf

    folder, where = Path(path).expanduser(), f"{name} {path}"
    if is_exchange(path):
        check_packages(folder)
    if is_exchange(path) or is_gguf(path):
        require(not folder.exists(), "exists already", where=where, fix="give a new name, or remove it")
    is_file = folder.exists() and not folder.is_dir()
    require(not is_file, "is a file", where=where, fix="give a new folder")
    in_use = folder.is_dir() and any(folder.iterdir())
    require(not in_use, "the folder is not empty", where=where, fix="give a new folder, or remove this one")
    _check_writable(folder, where)


def work_folder(out: str, resume: bool) -> Path:
    """Where the checkpoints of a run lie until its result is at `out`: OUT.run. Without `resume` an unfinished run is removed."""
    work = Path(f"{Path(out).expanduser()}.run")
    if not resume and (work / "run.json").exists():  # a folder of anything else is refused later
        shutil.rmtree(work)
    return work


def check_new_file(path: str | None, name: str = "--report") -> None:
    """Refuse a file that cannot be written before any work is done."""
    if path is None:
        return
    file, where = Path(path).expanduser(), f"{name} {path}"
    require(not file.is_dir(), "is a folder", where=where, fix="give the name of an .html file")
    _check_writable(file, where)


def _check_writable(path: Path, where: str) -> None:
    parent = path if path.is_dir() else path.parent
    while not parent.exists():
        parent = parent.parent
    require(parent.is_dir(), f"{parent} is a file", where=where, fix="choose another place")
    try:
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise SecateurError(
            f"cannot write in {parent} ({reason})", where=where, fix="choose a place you may write to"
        ) from error


def check_file_model(model: str, out: str | None) -> None:
    """A model that was read from a file is written to a file."""
    from secateur.io.exchange import is_exchange

    alike = not out or not is_exchange(model) or is_exchange(out)
    what, fix = (
        "a model read from an .onnx or .pt2 file is written to one",
        f"end the name in {Path(model).suffix}",
    )
    require(alike, what, where=f"--out {out}", fix=fix)


def write_model(pruned: Any, inputs: Any, out: str, packed: bool = False) -> None:
    """Save a pruned model as a folder, or as an .onnx, .pt2 or .gguf file; the report says how that was checked."""
    if is_exchange_or_gguf(out):
        pruned.report["export"] = write_file(pruned.model, inputs, out, pruned.tokenizer)
    else:
        pruned.save(Path(out).expanduser(), packed=packed)


def is_exchange_or_gguf(out: str) -> bool:
    """Whether the result is a file and not a folder."""
    from secateur.io.exchange import is_exchange
    from secateur.io.gguf import is_gguf

    return is_exchange(out) or is_gguf(out)


def write_file(model: Any, inputs: Any, out: str, tokenizer: Any) -> dict[str, Any]:
    """Write a model as the kind of file that a name ends in; gives how that was checked."""
    from secateur.io.exchange import export
    from secateur.io.gguf import export_gguf, is_gguf
    from secateur.utils.inputs import default_inputs

    if is_gguf(out):
        return export_gguf(model, out, tokenizer)
    return export(model, default_inputs(model) if inputs is None else inputs, out)


def check_written(model: Any, tokenizer: Any, out: str | None) -> None:
    """Refuse a model that can't be written as --out asks, before it is pruned."""
    from secateur.io.gguf import check_gguf, is_gguf

    if is_gguf(out):
        check_gguf(model, tokenizer)


# ---------------------------------------------------------------- models


def check_device(device: str | None) -> None:
    """Refuse a device that this machine hasn't got."""
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise SecateurError(
            f"{device!r} can't be used ({reason})", where="--device", fix="cpu works"
        ) from error


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """What a pipeline of diffusers draws for calibration, and how."""

    prompts: str | None = flag(
        "of a pipeline of diffusers: a text file with a prompt, or a class number, in each line", None
    )
    drawing: tuple[str, ...] | None = flag(
        "of a pipeline: a further argument of its call, such as num_inference_steps=20; may be repeated", None
    )

    @property
    def asked(self) -> dict[str, Any]:
        """Arguments of `prune` and `train_prune`."""
        asked: dict[str, Any] = {}
        if self.prompts is not None:
            asked["prompts"] = _lines(self.prompts)
        if self.drawing is not None:
            asked["drawing"] = dict(_argument(text) for text in self.drawing)
        return asked


def _lines(path: str) -> list[Any]:
    """The lines of a file that aren't empty: class numbers where all are numbers."""
    file = Path(path).expanduser()
    require(file.is_file(), "no such file", where=f"--prompts {path}", fix=check_path(file))
    try:
        lines = [line.strip() for line in file.read_text("utf-8").splitlines() if line.strip()]
    except (UnicodeDecodeError, OSError) as error:
        raise SecateurError(
            f"it isn't text ({error})", where=f"--prompts {path}", fix="a prompt a line, in UTF-8"
        ) from error
    require(lines, "it is empty", where=f"--prompts {path}", fix="write a prompt a line")
    return (
        [int(line) for line in lines] if all(line.isascii() and line.isdigit() for line in lines) else lines
    )


def _argument(text: str) -> tuple[str, Any]:
    """`guidance_scale=7.5` -> ("guidance_scale", 7.5); what isn't a number, true, false or null is text."""
    name, equals, value = text.partition("=")
    require(
        equals and name.isidentifier(),
        f"{text!r} isn't name=value",
        where="--drawing",
        fix="such as --drawing num_inference_steps=20",
    )
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def open_model(name: str, device: str | None, dtype: str | None) -> tuple[Any, Any]:
    """(model, tokenizer) on the device and in the dtype that the flags name."""
    from secateur.tasks import load_model

    check_device(device)
    return load_model(name, dtype=dtype, device=device)


def open_with_inputs(name: str, where: Where) -> tuple[Any, Any, Any]:
    """(model, tokenizer, example inputs)."""
    network, tokenizer = open_model(name, where.device, where.dtype)
    return network, tokenizer, example(network, where.input_shape)


def add_times(report: dict[str, Any], before: Any, after: Any, inputs: Any, seqlen: int) -> None:
    """Times both models in turn, and puts what was found into the report of the two."""
    from secateur.measure import latencies, token_inputs

    sizes = [getattr(getattr(model, "config", None), "vocab_size", None) or 0 for model in (before, after)]
    inputs = token_inputs(after if sizes[1] < sizes[0] else before, seqlen) if inputs is None else inputs
    times, report["speed"], reasons = latencies([before, after], inputs)
    for side, found in zip(("before", "after"), times, strict=True):
        report[side]["latency"] = found
        report[side]["not_measured"] |= reasons


def further(model: Any, given: Sequence[str] | None) -> list[Any]:
    """The example inputs that --also names."""
    return [example(model, text, "--also") for text in given or ()]


def _tensors(model: Any, path: str, where: str) -> dict[str, Any]:
    """The tensors of a file by name, on the model's device, floats in its dtype."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = Path(path).expanduser()
    require(file.is_file(), "no such file", where=f"{where} {path}", fix=check_path(file))
    try:
        tensors = load_file(file)
    except (SafetensorError, OSError) as error:
        raise SecateurError(
            f"it can't be read ({error})", where=f"{where} {path}", fix="write it again"
        ) from error
    require(
        tensors, "it holds no tensors", where=f"{where} {path}", fix="write the inputs of forward by name"
    )
    first = next(model.parameters())
    return {
        name: value.to(first.device, first.dtype if value.is_floating_point() else None)
        for name, value in tensors.items()
    }


def example(model: Any, shape: str | None, where: str = "--input-shape") -> Any:
    """Example inputs: noise of `shape`, what a .safetensors file in its place holds, or noise of the size of pictures a config
    states; None for a language model."""
    import torch

    from secateur.utils.inputs import default_inputs, picture_size

    if shape is not None and shape.lower().endswith(".safetensors"):
        return _tensors(model, shape, where)
    if hasattr(model, "example_inputs"):
        return model.example_inputs(shape)
    if shape is None:
        config = getattr(model, "config", None)
        if getattr(config, "vocab_size", None) is not None:
            return None
        if picture_size(model) is not None:
            return default_inputs(model)
        size, channels = getattr(config, "image_size", None), getattr(config, "num_channels", 3)
        require(
            size is not None,
            f"{type(model).__name__} isn't a language model, so its inputs can't be guessed",
            where="inputs",
            fix="give --input-shape, such as --input-shape 1,3,224,224",
        )
        sizes = [1, channels, *(size if isinstance(size, list | tuple) else (size, size))]
    else:
        try:
            sizes = [int(part) for part in re.split(r"[,x]", shape)]
            if min(sizes) < 1:
                raise ValueError(shape)
        except ValueError:
            raise SecateurError(
                f"{shape!r} isn't a shape", where=where, fix="write sizes such as 1,3,224,224"
            ) from None
    first = next(model.parameters())
    vocabulary = getattr(getattr(model, "config", None), "vocab_size", None)
    if vocabulary is not None and picture_size(model) is None:
        ids = torch.randint(vocabulary, sizes, generator=torch.Generator().manual_seed(0))
        return {"input_ids": ids.to(first.device)}
    noise = torch.randn(sizes, generator=torch.Generator().manual_seed(0)).to(first.device, first.dtype)
    name = getattr(model, "main_input_name", None)
    return {name: noise} if name else noise
