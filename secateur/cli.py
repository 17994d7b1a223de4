"""The command line. Flags and their help are the dataclasses and signatures of the Python API.

Results go to stdout (with `--json` one JSON object and nothing else), progress and messages to stderr. A user's mistake
is one line and exit code 2; a check of `doctor` that failed is exit code 1; a bug keeps its traceback.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import errno
import inspect
import json
import math
import os
import re
import shlex
import sys
import tempfile
import time
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import cyclopts
from cyclopts import App, Group

from secateur import __version__
from secateur.commands import doctor, saliency, scenes, train
from secateur.commands import tokens as visual_tokens
from secateur.errors import SecateurError
from secateur.flags import (
    command,
    fields_as_flags,
    flag,
    in_group,
    listed,
    named_method,
    on_off,
    own_flag,
    switches_of,
    word,
    words,
)
from secateur.options import Options
from secateur.taxonomy import AXES, FLAGS, MEANING, RECORDS, MethodInfo
from secateur.taxonomy import recommend as advise

MISTAKE = 2
MODEL = (
    "smollm2, aidreams, a task or its network (cifar10, resnet56, vdsr, espnet, ...), a folder that transformers or"
    " secateur wrote, an .onnx or .pt2 file, or a hub name"
)
TARGET = "what holds at the end: 50% (share kept), 'params<=100e6', 'macs<=50%', 'size<=200MB', 'latency<=8ms', 2:4"


@dataclasses.dataclass(frozen=True)
class Recovery:
    """Training after the cut."""

    recover: Literal["lora", "full"] | None = dataclasses.field(
        default=None,
        metadata={"help": "train what is left: low-rank updates that are merged, or all weights"},
    )
    steps: int = dataclasses.field(default=100, metadata={"help": "training steps, of 8 windows each"})
    distill: bool = dataclasses.field(
        default=False, metadata={"help": "learn from the dense model as well (keeps it in memory)"}
    )
    recover_lr: float | None = dataclasses.field(
        default=None, metadata={"help": "learning rate; default: 3e-4 for lora, 3e-5 for full"}
    )


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
FILE_METHOD = "group-magnitude"


def prune_parameters(method: str | None, default: str | None = None) -> list[inspect.Parameter]:
    """Flags of `prune`; with a method's name, its hyperparameters too. `default`: the method where none is named."""
    options = fields_as_flags(Options, Group("Options", sort_key=2))
    output, quality = Group("Output", sort_key=4), Group("Measurement", sort_key=3)
    made = [
        word("model", help=MODEL),
        flag(
            "method",
            str,
            default or inspect.Parameter.empty,
            f"the method: `secateur methods` lists them; default for .onnx and .pt2: {FILE_METHOD}",
        ),
        flag("target", help=TARGET),
        flag(
            "data",
            str | None,
            None,
            "calibration text: a .txt or .jsonl file, wikitext2, ...; default: some English",
        ),
        flag("seed", int, 0, "of everything that is drawn by chance"),
    ]
    made += options
    made += fields_as_flags(Recovery, Group("Recovery", sort_key=3))
    made += [in_group(TASKS, quality), in_group(LIMIT, quality), in_group(LATENCY, quality), *WHERE]
    made += [
        flag("out", str | None, None, OUT_HELP, output),
        flag("report", str | None, None, "a self-contained HTML file with the report", output),
        flag("inplace", bool, True, "cut the loaded model itself; a copy takes twice the memory", output),
        flag("resume", bool, True, "keep finished steps, so that a killed run goes on where it was", output),
        in_group(JSON, output),
    ]
    if method is not None:
        from secateur.method import method_class

        cls = method_class(method)
        taken = {parameter.name for parameter in made}
        group = Group(f"Hyperparameters of {cls.name}", sort_key=1)
        made += fields_as_flags(cls, group, lambda field: own_flag(cls.name, field, taken))
    return made


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
    from secateur.exchange import check_packages, is_exchange

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
        near = difflib.get_close_matches(task, known, n=1, cutoff=0.6)
        fix = f"did you mean {near[0]}?" if near else f"give a text file, or one of {', '.join(known)}"
        raise SecateurError(f"there is no task {task!r}", where="--tasks", fix=fix)
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

    from secateur.inputs import default_inputs, picture_size

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


# ---------------------------------------------------------------- verbs


def prune(model: str, **given: Any) -> None:
    from secateur.measure import measure as run_measure
    from secateur.method import make_method, method_class
    from secateur.progress import track
    from secateur.prune import prune as run
    from secateur.report.html import library_versions, write_report
    from secateur.report.terminal import print_report

    out, page = given["out"], given["report"]
    check_new_folder(out)
    check_file_model(model, out)
    check_new_file(page)
    cls = method_class(given["method"])
    taken = {parameter.name for parameter in prune_parameters(None)}
    fields = {item.name: own_flag(cls.name, item.name, taken) for item in dataclasses.fields(cls)}
    method = make_method(cls, **{name: given[flag_] for name, flag_ in fields.items() if flag_ in given})
    settings = {item.name: given[item.name] for item in dataclasses.fields(Options)}
    settings["kinds"] = listed(given["kinds"]) or None
    Options(**settings).check()
    recovery = Recovery(**{item.name: given[item.name] for item in dataclasses.fields(Recovery)})
    if recovery.steps < 1:
        raise SecateurError(f"{recovery.steps} steps is no training", where="--steps", fix="give 1 or more")
    check_target(given["target"])
    check_measurement(given)
    tasks = {"tasks": listed(given["tasks"]), "limit": given["limit"]}
    with quiet_stdout():
        network, tokenizer = open_model(model, given)
        inputs = example(network, given["input_shape"])
        times = {"before": _times(network, inputs, settings["seqlen"])} if given["latency"] else {}
        inplace = given["inplace"] and not (recovery.recover and recovery.distill)
        pruned = run(
            network,
            inputs,
            method=method,
            target=given["target"],
            data=given["data"],
            seed=given["seed"],
            tokenizer=tokenizer,
            inplace=inplace,
            rollback=False,
            resume=given["resume"],
            progress=track,
            announce=lambda line: print(line, file=sys.stderr),
            **tasks,
            **settings,
        )
        report = pruned.report
        if recovery.recover:
            _recover(pruned, recovery, network, given["data"], given["seed"])
            measured = {"inputs": inputs, "tokenizer": tokenizer, "seqlen": settings["seqlen"], **tasks}
            report["cut"], report["after"] = report["after"], run_measure(pruned.model, **measured)
        if given["latency"]:
            times["after"] = _times(pruned.model, inputs, settings["seqlen"])
            for when, (seconds, reasons) in times.items():
                report[when]["latency"] = seconds
                report[when]["not_measured"] |= reasons
        report |= {"model": model, "out": out, "command": shlex.join(["secateur", *_argv])}
        report["versions"] = library_versions()
        if out:
            write_model(pruned, inputs, out)
            print(f"model: {out}", file=sys.stderr)
        if page:
            scores = {name: values.tolist() for name, values in pruned.scores.items()}
            write_report(Path(page).expanduser(), {**report, "scores": scores}, pruned.plan)
            print(f"report: {page}", file=sys.stderr)
    show(report, given["json"], lambda console: print_report(report, console))


_argv: list[str] = []


def write_model(pruned: Any, inputs: Any, out: str) -> None:
    """Save a pruned model as a folder, or as an .onnx or .pt2 file; the report says how that was checked."""
    from secateur.exchange import export, is_exchange
    from secateur.inputs import default_inputs

    if is_exchange(out):
        inputs = default_inputs(pruned.model) if inputs is None else inputs
        pruned.report["export"] = export(pruned.model, inputs, out)
    else:
        pruned.save(Path(out).expanduser())


def check_file_model(model: str, out: str | None) -> None:
    """A model that was read from a file is written to a file."""
    from secateur.exchange import is_exchange

    if out and is_exchange(model) and not is_exchange(out):
        raise SecateurError(
            "a model read from an .onnx or .pt2 file is written to one",
            where=f"--out {out}",
            fix=f"end the name in {Path(model).suffix}",
        )


def _recover(pruned: Any, recovery: Recovery, dense: Any, data: Any, seed: int) -> None:
    """Train the pruned model on the calibration text; what was trained goes into the report."""
    from secateur.data import calibration_batches
    from secateur.recover import recover

    options = pruned.report["options"]
    samples = max(options["samples"], min(8 * recovery.steps, 1024))
    windows = calibration_batches(data, pruned.tokenizer, pruned.model, samples, options["seqlen"], seed)
    start = time.perf_counter()
    losses = recover(
        pruned.model,
        windows,
        how=recovery.recover or "lora",
        steps=recovery.steps,
        lr=recovery.recover_lr,
        teacher=dense if recovery.distill else None,
        masks=pruned.plan.masks,
        seed=seed,
    )
    pruned.report["recovery"] = {**dataclasses.asdict(recovery), "losses": losses}
    pruned.report["seconds"] += time.perf_counter() - start


def check_target(text: str) -> None:
    """Read the target before anything is loaded."""
    from secateur.budget import parse_target

    if text.strip().lower() in ("params", "macs", "size", "latency"):
        raise SecateurError(
            f"{text!r} has no limit",
            where="target",
            fix=f"quote it, the shell reads < and >: --target '{text}<=50%'",
        )
    parse_target(text)


def _times(model: Any, inputs: Any, seqlen: int) -> tuple[dict[str, float], dict[str, str]]:
    from secateur.measure import measure as run

    figures = run(model, latency=True, seqlen=seqlen, inputs=inputs)
    return figures["latency"], figures["not_measured"]


def measure(model: str, **given: Any) -> None:
    from secateur.measure import measure as run
    from secateur.report.terminal import print_measurement

    check_measurement(given)
    with quiet_stdout():
        network, tokenizer = open_model(model, given)
        asked = {name: given[name] for name in ("limit", "seqlen", "latency")}
        inputs = example(network, given["input_shape"])
        figures = run(network, tokenizer, tasks=listed(given["tasks"]), inputs=inputs, **asked)
    figures = {"model": model, **figures}
    show(figures, given["json"], lambda console: print_measurement(figures, console, model))


def inspect_model(model: str, **given: Any) -> None:
    from secateur.graph import trace
    from secateur.inputs import default_inputs
    from secateur.report.graph import describe_groups, write_graph
    from secateur.report.terminal import print_graph

    check_new_file(given["html"], "--html")
    with quiet_stdout():
        network, _ = open_model(model, given)
        inputs = example(network, given["input_shape"])
        graph = trace(network, default_inputs(network) if inputs is None else inputs)
        found = {"model": model, **describe_groups(graph)}
        if given["html"]:
            write_graph(Path(given["html"]).expanduser(), graph, model)
            print(f"picture: {given['html']}", file=sys.stderr)
    show(found, given["json"], lambda console: print_graph(found, console, given["full"]))


def methods(*text: str, **given: Any) -> None:
    from secateur.method import list_methods, method_class
    from secateur.report.terminal import print_method, print_methods

    filters = {key: value for key, value in given.items() if key != "json" and value is not None}
    names = list_methods()
    key = "-".join(text).strip().lower().replace("_", "-")
    if key in names and not filters:
        cls = method_class(key)
        found = describe_method(cls.info)
        found["hyperparameters"] = [
            {"name": item.name, "default": _default(item), "help": item.metadata.get("help", "")}
            for item in dataclasses.fields(cls)
            if item.init
        ]
        found["needs"] = sorted(cls.needs)
        found["doc"] = inspect.cleandoc(cls.__doc__ or "")
        show(found, given["json"], lambda console: print_method(found, cls.info, console))
        return
    matching = list_methods(search=" ".join(text) or None, **filters)
    if not matching and len(text) == 1 and not filters:
        method_class(text[0])
    records = [method_class(name).info for name in matching]
    value = {"methods": [describe_method(info) for info in records]}
    show(value, given["json"], lambda console: print_methods(records, console))


def recommend(**given: Any) -> None:
    from secateur.method import list_methods, method_class
    from secateur.report.terminal import print_advice

    as_json, published = given.pop("json"), given.pop("published")
    records: Iterable[MethodInfo] = RECORDS
    if not published:
        records = [method_class(name).info for name in list_methods()]
    advice = advise(records, **given)
    value = {"methods": [{**describe_method(info), "why": why} for info, why in advice]}
    show(value, as_json, lambda console: print_advice(advice, console))


def describe_method(info: MethodInfo) -> dict[str, Any]:
    """A record as JSON: axes as lists of members."""
    fields = {item.name: getattr(info, item.name) for item in dataclasses.fields(info)}
    axes = {axis: sorted(info.members(axis)) for axis in AXES}
    flags = {name: getattr(info, name) for name in FLAGS}
    return plain({"name": info.name or info.spec, **fields, **axes, **flags, "links": info.links})


def _default(item: dataclasses.Field) -> Any:
    if item.default_factory is not dataclasses.MISSING:
        return item.default_factory()
    return None if item.default is dataclasses.MISSING else item.default


def plan_show(directory: str, **given: Any) -> None:
    from secateur.plan import Plan
    from secateur.report.terminal import print_plan

    plan = Plan.load(Path(directory).expanduser())
    value = {
        name: getattr(plan, name)
        for name in ("method", "target", "seed", "hyperparameters", "options", "inputs", "notes")
    }
    value |= {"rows": plan.summary(), "values": sorted(plan.values)}
    show(value, given["json"], lambda console: print_plan(value, console, given["full"]))


def plan_diff(first: str, second: str, **given: Any) -> None:
    from secateur.plan import Plan, diff
    from secateur.report.terminal import print_diff

    plans = [Plan.load(Path(path).expanduser()) for path in (first, second)]
    value = {"first": first, "second": second, "rows": diff(*plans)}
    show(value, given["json"], lambda console: print_diff(value, console))


def plan_apply(plan: str, model: str, **given: Any) -> None:
    import copy

    from secateur.artefact import save_model
    from secateur.exchange import export, is_exchange
    from secateur.inputs import default_inputs
    from secateur.measure import measure as run
    from secateur.plan import Plan
    from secateur.prune import apply_plan
    from secateur.report.terminal import print_report

    check_new_folder(given["out"])
    check_file_model(model, given["out"])
    check_measurement(given)
    decided = Plan.load(Path(plan).expanduser())
    with quiet_stdout():
        network, tokenizer = open_model(model, given)
        asked: dict[str, Any] = {"tasks": listed(given["tasks"]), "limit": given["limit"]}
        inputs = example(network, given["input_shape"])
        before = run(network, tokenizer, inputs=inputs, **asked)
        config = copy.deepcopy(getattr(network, "config", None))
        changes = apply_plan(network, decided)
        after = run(network, tokenizer, inputs=inputs, **asked)
        report = {"model": model, "method": decided.method, "target": decided.target, "seed": decided.seed}
        report |= {
            "before": before,
            "after": after,
            "out": given["out"],
            "notes": list(decided.notes.values()),
        }
        rows = decided.summary()
        report["groups"] = [{**row, "reason": None} for row in rows if row["kind"] != "weights"]
        report["weights"] = [row for row in rows if row["kind"] == "weights"]
        if is_exchange(given["out"]):
            report["export"] = export(
                network, default_inputs(network) if inputs is None else inputs, given["out"]
            )
        elif given["out"]:
            save_model(
                network,
                Path(given["out"]).expanduser(),
                tokenizer=tokenizer,
                plan=decided,
                report=report,
                dense_config=config,
                changes=changes,
            )
    show(report, given["json"], lambda console: print_report(report, console))


# ---------------------------------------------------------------- the application


def build(argv: Sequence[str]) -> tuple[App, list[str]]:
    """The application, and the command line with `on` and `off` read; `prune` gets the flags of the method it names."""
    app = App(
        name="secateur",
        version=__version__,
        help="Find what is redundant in a neural network, cut it out, and see what the cut did.",
        result_action="return_value",
        help_on_error=False,
        suppress_keyboard_interrupt=False,
    )
    verb = next((token for token in argv if not token.startswith("-")), "")
    parameters: list[inspect.Parameter] = [JSON]
    if verb == "prune":
        default = None
        if named_method(argv) is None and any(
            token.lower().endswith((".onnx", ".pt2")) for token in argv[1:2]
        ):
            default = FILE_METHOD
        parameters = prune_parameters(named_method(argv) or default, default)
    text = "Make a model smaller.\n\nWith --method NAME, --help shows the method's hyperparameters too."
    app.command(command(parameters, prune, text), name="prune")
    trained = train.parameters(named_method(argv) if verb == "train-prune" else None, JSON)
    app.command(command(trained, train.run, train.TEXT), name="train-prune")
    dropped = visual_tokens.parameters(named_method(argv) if verb == "tokens" else None, JSON)
    app.command(command(dropped, visual_tokens.run, visual_tokens.TEXT), name="tokens")
    trainer, fresh = (
        App(name="train", help="Train the models that come with the library."),
        scenes.parameters(JSON),
    )
    trainer.command(command(fresh, scenes.run, scenes.TEXT), name="scenes")
    app.command(trainer)
    shown = saliency.parameters(
        (named_method(argv) or saliency.DEFAULT) if verb == "saliency" else None, JSON
    )
    app.command(command(shown, saliency.run, saliency.TEXT), name="saliency")
    inspected = [
        word("model", help=MODEL),
        flag("html", str | None, None, "a self-contained HTML file with the groups as a picture"),
        flag("full", bool, False, "every group in a row of its own"),
        *WHERE,
        JSON,
    ]
    text = "Show what can be cut: groups, kinds, sizes, shares of the cost; and what cannot, and why."
    app.command(command(inspected, inspect_model, text), name="inspect")
    measured = [word("model", help=MODEL), TASKS, LIMIT, SEQLEN, LATENCY, *WHERE, JSON]
    app.command(command(measured, measure, "Measure size, cost, speed and quality."), name="measure")
    app.command(
        command([*_filters(), JSON], methods, "List the methods, search them, or show one."), name="methods"
    )
    text = "Methods that fit, best first, with reasons."
    app.command(command([*_advice(), JSON], recommend, text), name="recommend")
    app.command(command(doctor.parameters(JSON), doctor.run, doctor.TEXT), name="doctor")
    plans = App(name="plan", help="Show, compare and apply plans: what is kept, as data.")
    full = flag("full", bool, False, "every group in a row of its own")
    where = "a folder that holds a plan.json, or the file"
    plans.command(
        command([word("directory", help=where), full, JSON], plan_show, "Show a plan."), name="show"
    )
    both = [word("first", help=where), word("second", help="the other"), JSON]
    plans.command(command(both, plan_diff, "Show where two plans differ."), name="diff")
    applied = [word("plan", help=where), word("model", help="the dense model"), flag("out", help=OUT_HELP)]
    applied += [TASKS, LIMIT, *WHERE, JSON]
    plans.command(command(applied, plan_apply, "Do what a plan says to a fresh model."), name="apply")
    app.command(plans)
    every = [
        *parameters,
        *trained,
        *dropped,
        *fresh,
        *shown,
        *inspected,
        *measured,
        *_filters(),
        *_advice(),
        full,
    ]
    return app, on_off(argv, switches_of(every))


def _filters() -> list[inspect.Parameter]:
    made = [words("text", "words to look for in names, titles and descriptions; or the name of one method")]
    for axis, members in AXES.items():
        named = ", ".join(f"{m} ({MEANING[m]})" if m in MEANING else m for m in members)
        made.append(flag(axis, str | None, None, f"one or several as a/b: {named}"))
    for name in FLAGS:
        made.append(
            flag(name, bool | None, None, _first_line(getattr(MethodInfo, name)) or name.replace("_", " "))
        )
    return made


def _first_line(documented: Any) -> str:
    return (documented.__doc__ or "").split("\n")[0]


def _advice() -> list[inspect.Parameter]:
    """The keywords of `taxonomy.recommend`; its docstring is their help."""
    text = " ".join((advise.__doc__ or "").split())
    hints = typing.get_type_hints(advise)
    made = []
    for name, parameter in inspect.signature(advise).parameters.items():
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
            found = re.search(rf"`{name}`: (.+?)(?=\. `|\. Raises)", text)
            made.append(flag(name, hints[name], parameter.default, found[1] if found else ""))
    made.append(
        flag("published", bool, False, "choose among all published systems, also those not in this library")
    )
    return made


@contextlib.contextmanager
def quiet_stdout() -> Iterator[None]:
    """What libraries print goes to stderr: stdout belongs to the result."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; gives the exit code: 0, 1 where `doctor` found a failure, or 2 for anything that the user can mend.

    >>> main(["methods", "--when", "PAT-PT", "--json"])  # doctest: +SKIP
    """
    given = list(sys.argv[1:] if argv is None else argv)
    _argv[:] = given
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        app, tokens = build(given)
        return app(tokens, exit_on_error=False, print_error=False) or 0
    except cyclopts.CycloptsError as error:
        return _fail(_explain(error))
    except SecateurError as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        resumes = given[:1] == ["prune"] and "--no-resume" not in given
        again = "run the same command again to continue" if resumes else "run it again to start anew"
        if given[:1] == ["train-prune"] and any(token.startswith("--out") for token in given):
            again = "run the same command with --resume to continue"
        return _fail(f"interrupted; nothing is half written; {again}")
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  the reader of our output has gone
        return 0
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return _fail(f"the disk is full ({error.filename or error}); free some space, or write elsewhere")
        raise
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, MemoryError) or re.search("out of memory|can't allocate memory", str(error)):
            reason = (str(error) or "of the machine").splitlines()[0]
            return _fail(f"out of memory ({reason}); lower --samples or --seqlen, or take a smaller model")
        raise


def _explain(error: cyclopts.CycloptsError) -> str:
    """What cyclopts found wrong, in one line."""
    text = " ".join(str(error).split())
    if isinstance(error, cyclopts.UnusedCliTokensError):
        return f"too many arguments: {' '.join(error.unused_tokens or [])}; --help shows what it takes"
    if isinstance(error, cyclopts.UnknownOptionError):
        name = error.token.keyword or ""
        owners = (
            [] if named_method(_argv) is None else _methods_with(name.removeprefix("--").replace("-", "_"))
        )
        if owners:
            return (
                f"Unknown option: {name}, which belongs to {' and '.join(owners[:4])}; --help lists the flags"
            )
        return text if "Did you mean" in text else f"{text} --help lists the flags"
    return text


def _methods_with(field: str) -> list[str]:
    """The methods that have a hyperparameter of this name."""
    from secateur.method import list_methods, method_class

    return [n for n in list_methods() if field in {item.name for item in dataclasses.fields(method_class(n))}]


def _fail(message: str) -> int:
    print(f"secateur: {' '.join(message.split())}", file=sys.stderr)
    return MISTAKE


if __name__ == "__main__":
    sys.exit(main())
