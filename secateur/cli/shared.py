"""What the verbs of the command line share: flags, checks before the work starts, models, output."""

from __future__ import annotations

import contextlib
import json
import math
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from secateur.cli.flags import flag, listed
from secateur.errors import SecateurError, choose

MISTAKE = 2
MODEL = (
    "smollm2, aidreams, a task or its network (cifar10, resnet56, vdsr, espnet, ...), a folder that transformers or"
    " secateur wrote, an .onnx or .pt2 file, or a hub name"
)
TARGET = "what holds at the end: 50% (share kept), 'params<=100e6', 'macs<=50%', 'size<=200MB', 'latency<=8ms', 2:4"


JSON = flag("json", bool, False, "print one JSON object, and nothing else, on stdout")
TASKS = flag(
    "tasks",
    str | None,
    None,
    "measure quality on these, separated by commas: texts (perplexity: wikitext2, ptb, a file), sets of questions"
    " (accuracy: piqa, arc_easy, ...) and of pictures (cifar10, digits, camvid; PSNR: set5, set14)",
)
LIMIT = flag("limit", int | None, None, "at most this many windows of a text and questions of a set")
LATENCY = flag("latency", bool, False, "measure the time of a forward, and of a new token")
SEQLEN = flag("seqlen", int, 512, "tokens in an evaluation window")
SHAPE = flag(
    "input_shape",
    str | None,
    None,
    "shape of the example input of a model that reads pictures or of a file, such as 1,3,224,224; for several inputs"
    " name:1,16;other:1,16",
)
DEVICE = flag("device", str | None, None, "cpu, cuda, cuda:1, mps, ...; default: cpu")
DTYPE = flag(
    "dtype", str | None, None, "float32, bfloat16 or float16; default: float32 where it fits on a cpu"
)
WHERE = [SHAPE, DEVICE, DTYPE]
OUT_HELP = "a new folder for the result, or a new .onnx or .pt2 file"


# ---------------------------------------------------------------- what verbs share


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


def check_new_folder(path: str | None, name: str = "--out") -> None:
    """Refuse a folder that is in use, or an .onnx or .pt2 file that exists, before any work is done."""
    if path is None:
        return
    from secateur.io.exchange import check_packages, is_exchange

    folder = Path(path).expanduser()
    if is_exchange(path):
        check_packages(folder)
        if folder.exists():
            raise SecateurError("exists already", where=f"{name} {path}", fix="give a new name, or remove it")
    elif folder.exists() and not folder.is_dir():
        raise SecateurError("is a file", where=f"{name} {path}", fix="give a new folder")
    if folder.is_dir() and any(folder.iterdir()):
        raise SecateurError(
            "the folder is not empty", where=f"{name} {path}", fix="give a new folder, or remove this one"
        )
    _check_writable(folder, f"{name} {path}")


def check_new_file(path: str | None, name: str = "--report") -> None:
    """Refuse a file that cannot be written before any work is done."""
    if path is None:
        return
    file = Path(path).expanduser()
    if file.is_dir():
        raise SecateurError("is a folder", where=f"{name} {path}", fix="give the name of an .html file")
    _check_writable(file, f"{name} {path}")


def _check_writable(path: Path, where: str) -> None:
    parent = path if path.is_dir() else path.parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise SecateurError(f"{parent} is a file", where=where, fix="choose another place")
    try:
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise SecateurError(
            f"cannot write in {parent} ({reason})", where=where, fix="choose a place you may write to"
        ) from error


def check_measurement(given: Mapping[str, Any]) -> None:
    """Refuse unknown tasks and impossible sizes before any work is done."""
    from secateur.data import choices, text
    from secateur.measure import SEEN

    known = [*text.NAMES, *choices.SETS, *SEEN]
    for task in listed(given.get("tasks")):
        if task in known or Path(task).expanduser().is_file():
            continue
        fix = f"give a text file, or one of {', '.join(known)}"
        choose(task, known, what="task", where="--tasks", near=1, cutoff=0.6, fix=fix)
    for name, least in (("limit", 1), ("seqlen", 2)):
        value = given.get(name)
        if value is not None and value < least:
            raise SecateurError(f"{value} is too few", where=f"--{name}", fix=f"give {least} or more")


def open_model(name: str, given: Mapping[str, Any]) -> tuple[Any, Any]:
    """(model, tokenizer) on the device and in the dtype that the flags name."""
    import torch

    from secateur.tasks import load_model

    device = given["device"]
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise SecateurError(
            f"{device!r} can't be used ({reason})", where="--device", fix="cpu works"
        ) from error
    return load_model(name, dtype=given["dtype"], device=device)


def example(model: Any, shape: str | None) -> Any:
    """Example inputs: noise of `shape`, or of the size of pictures a config states; None for a language model."""
    import torch

    from secateur.utils.inputs import default_inputs, picture_size

    if hasattr(model, "example_inputs"):
        return model.example_inputs(shape)
    if shape is None:
        config = getattr(model, "config", None)
        if getattr(config, "vocab_size", None) is not None:
            return None
        if picture_size(model) is not None:
            return default_inputs(model)
        size, channels = getattr(config, "image_size", None), getattr(config, "num_channels", 3)
        if size is None:
            raise SecateurError(
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
                f"{shape!r} isn't a shape", where="--input-shape", fix="write sizes such as 1,3,224,224"
            ) from None
    first = next(model.parameters())
    noise = torch.randn(sizes, generator=torch.Generator().manual_seed(0)).to(first.device, first.dtype)
    name = getattr(model, "main_input_name", None)
    return {name: noise} if name else noise


_argv: list[str] = []


def write_model(pruned: Any, inputs: Any, out: str) -> None:
    """Save a pruned model as a folder, or as an .onnx or .pt2 file; the report says how that was checked."""
    from secateur.io.exchange import export, is_exchange
    from secateur.utils.inputs import default_inputs

    if is_exchange(out):
        inputs = default_inputs(pruned.model) if inputs is None else inputs
        pruned.report["export"] = export(pruned.model, inputs, out)
    else:
        pruned.save(Path(out).expanduser())


def check_file_model(model: str, out: str | None) -> None:
    """A model that was read from a file is written to a file."""
    from secateur.io.exchange import is_exchange

    if out and is_exchange(model) and not is_exchange(out):
        raise SecateurError(
            "a model read from an .onnx or .pt2 file is written to one",
            where=f"--out {out}",
            fix=f"end the name in {Path(model).suffix}",
        )


@contextlib.contextmanager
def quiet_stdout() -> Iterator[None]:
    """What libraries print goes to stderr: stdout belongs to the result."""
    with contextlib.redirect_stdout(sys.stderr):
        yield
