"""`secateur prune`."""

from __future__ import annotations

import dataclasses
import inspect
import shlex
import sys
import time
from pathlib import Path
from typing import Any, Literal

from cyclopts import Group

from secateur.cli.flags import fields_as_flags, flag, in_group, listed, own_flag, word
from secateur.cli.shared import (
    JSON,
    LATENCY,
    LIMIT,
    MODEL,
    OUT_HELP,
    TARGET,
    TASKS,
    WHERE,
    _argv,
    check_file_model,
    check_measurement,
    check_new_file,
    check_new_folder,
    example,
    open_model,
    quiet_stdout,
    show,
    write_model,
)
from secateur.errors import SecateurError
from secateur.pruning.options import Options


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


# ---------------------------------------------------------------- verbs


def prune(model: str, **given: Any) -> None:
    from secateur.measure import measure as run_measure
    from secateur.method import make_method, method_class
    from secateur.pruning.prune import prune as run
    from secateur.report.html import library_versions, write_report
    from secateur.report.terminal import print_report
    from secateur.utils.progress import track

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


def _recover(pruned: Any, recovery: Recovery, dense: Any, data: Any, seed: int) -> None:
    """Train the pruned model on the calibration text; what was trained goes into the report."""
    from secateur.data import calibration_batches
    from secateur.training.recover import recover

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
    from secateur.pruning.target import parse_target

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
