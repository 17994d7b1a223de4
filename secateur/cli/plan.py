"""`secateur plan`: show, diff and apply."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from secateur.cli.flags import SWITCH, flag
from secateur.cli.inspect import FULL
from secateur.cli.shared import (
    ALSO_HELP,
    OUT_HELP,
    PLAN,
    Quality,
    Shown,
    Where,
    check_file_model,
    check_new_folder,
    check_written,
    further,
    is_exchange_or_gguf,
    open_with_inputs,
    quiet_stdout,
    show,
    write_file,
)


@dataclass(frozen=True, kw_only=True)
class Show:
    """How the plan is shown."""

    full: Annotated[bool, SWITCH] = flag(FULL, False)


def plan_show(directory: Annotated[str, PLAN], /, *, flags: Show, shown: Shown) -> None:
    """Show a plan."""
    from secateur.pruning.document import read_document, summarise, undamaged
    from secateur.report.terminal import print_plan

    path, document = read_document(Path(directory).expanduser())
    names = ("method", "target", "seed", "hyperparameters", "options", "inputs", "notes")
    with undamaged(path):
        value = {name: document[name] for name in names} | {"source": document.get("source", "")}
        value |= summarise(path, document)
    show(value, shown.json, lambda console: print_plan(value, console, flags.full))


def plan_diff(
    first: Annotated[str, PLAN], second: Annotated[str, Parameter(help="the other")], /, *, shown: Shown
) -> None:
    """Show where two plans differ."""
    from secateur.pruning.plan import Plan, diff
    from secateur.report.terminal import print_diff

    plans = [Plan.load(Path(path).expanduser()) for path in (first, second)]
    value = {"first": first, "second": second, "rows": diff(*plans)}
    show(value, shown.json, lambda console: print_diff(value, console))


@dataclass(frozen=True, kw_only=True)
class Apply:
    """What is written."""

    out: str = flag(OUT_HELP)
    also: tuple[str, ...] | None = flag(ALSO_HELP, None)


@dataclass(frozen=True, kw_only=True)
class Unpack:
    """What is written."""

    out: str = flag("a new folder")


def unpack(
    folder: Annotated[str, Parameter(help="a folder that --packed wrote")], /, *, flags: Unpack
) -> None:
    """Make a folder with packed zeros a dense one, which plain libraries load."""
    from secateur.io.packed import unpack as run

    check_new_folder(flags.out)
    run(folder, flags.out)
    print(f"model: {flags.out}", file=sys.stderr)


def plan_apply(
    plan: Annotated[str, PLAN],
    model: Annotated[str, Parameter(help="the dense model")],
    /,
    *,
    flags: Apply,
    quality: Quality,
    where: Where,
    shown: Shown,
    line: str,
) -> None:
    """Do what a plan says to a fresh model."""
    import copy

    from secateur.io.artefact import save_model
    from secateur.measure import measure as run
    from secateur.pruning.plan import Plan
    from secateur.pruning.prune import apply_plan, cut_tokenizer
    from secateur.report.summary import alarms
    from secateur.report.terminal import print_report
    from secateur.utils.inputs import map_ids

    out = flags.out
    check_new_folder(out)
    check_file_model(model, out)
    quality.check()
    decided = Plan.load(Path(plan).expanduser())
    with quiet_stdout():
        network, tokenizer, inputs = open_with_inputs(model, where)
        check_written(network, tokenizer, out)
        before = run(network, tokenizer, inputs=inputs, **quality.asked)
        config = copy.deepcopy(getattr(network, "config", None))
        apply_plan(network, decided, also=further(network, flags.also) or None)
        tokenizer = cut_tokenizer(decided, tokenizer)
        if (kept := decided.tokens) is not None and inputs is not None:
            inputs = map_ids(inputs, lambda ids: ids % len(kept))
        after = run(network, tokenizer, inputs=inputs, **quality.asked)
        rows = decided.summary()
        report = {
            "model": model, "method": decided.method, "target": decided.target, "seed": decided.seed, "before": before,
            "after": after, "out": out, "command": line, "notes": list(decided.notes.values()),
            "groups": [{**row, "reason": None} for row in rows if row["kind"] != "weights"],
            "weights": [row for row in rows if row["kind"] == "weights"],
        }  # fmt: skip
        report["collapsed"] = alarms(report)
        if is_exchange_or_gguf(out):
            report["export"] = write_file(network, inputs, out, tokenizer)
        else:
            about = {"tokenizer": tokenizer, "plan": decided, "report": report, "dense_config": config}
            save_model(network, Path(out).expanduser(), **about)
    show(report, shown.json, lambda console: print_report(report, console))
