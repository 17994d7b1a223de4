"""`secateur plan`: show, diff and apply."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from secateur.cli.flags import listed
from secateur.cli.shared import (
    check_file_model,
    check_measurement,
    check_new_folder,
    example,
    open_model,
    quiet_stdout,
    show,
)


def plan_show(directory: str, **given: Any) -> None:
    from secateur.pruning.plan import Plan
    from secateur.report.terminal import print_plan

    plan = Plan.load(Path(directory).expanduser())
    value = {
        name: getattr(plan, name)
        for name in ("method", "target", "seed", "hyperparameters", "options", "inputs", "notes")
    }
    value |= {"rows": plan.summary(), "values": sorted(plan.values)}
    show(value, given["json"], lambda console: print_plan(value, console, given["full"]))


def plan_diff(first: str, second: str, **given: Any) -> None:
    from secateur.pruning.plan import Plan, diff
    from secateur.report.terminal import print_diff

    plans = [Plan.load(Path(path).expanduser()) for path in (first, second)]
    value = {"first": first, "second": second, "rows": diff(*plans)}
    show(value, given["json"], lambda console: print_diff(value, console))


def plan_apply(plan: str, model: str, **given: Any) -> None:
    import copy

    from secateur.io.artefact import save_model
    from secateur.io.exchange import export, is_exchange
    from secateur.measure import measure as run
    from secateur.pruning.plan import Plan
    from secateur.pruning.prune import apply_plan
    from secateur.report.terminal import print_report
    from secateur.utils.inputs import default_inputs

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
        apply_plan(network, decided)
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
            )
    show(report, given["json"], lambda console: print_report(report, console))
