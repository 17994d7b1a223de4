"""`secateur measure` and `secateur inspect`."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from secateur.cli.flags import SWITCH, flag
from secateur.cli.shared import (
    ALSO_HELP,
    LATENCY_HELP,
    LIMIT_HELP,
    MODEL,
    TASKS_HELP,
    Quality,
    Shown,
    Where,
    add_times,
    at_least,
    check_new_file,
    further,
    open_with_inputs,
    quiet_stdout,
    show,
)

FULL = "every group in a row of its own"


@dataclass(frozen=True, kw_only=True)
class Measure(Quality):
    """What is measured."""

    # without the heading that other verbs have: it would hold every flag of this one
    tasks: str | None = flag(TASKS_HELP, None)
    limit: int | None = flag(LIMIT_HELP, None)
    seqlen: int = flag("tokens in an evaluation window", 512)
    latency: Annotated[bool, SWITCH] = flag(LATENCY_HELP, False)
    against: str | None = flag("another model, such as the dense one, to compare with", None)


def measure(model: Annotated[str, MODEL], /, *, flags: Measure, where: Where, shown: Shown) -> None:
    """Measure size, cost, speed and quality."""
    from secateur.measure import measure as run
    from secateur.report.summary import alarms
    from secateur.report.terminal import print_comparison, print_measurement

    flags.check()
    at_least("--seqlen", flags.seqlen, 2)
    asked = {**flags.asked, "seqlen": flags.seqlen}
    with quiet_stdout():
        network, tokenizer, inputs = open_with_inputs(model, where)
        if flags.against is None:
            one = run(network, tokenizer, inputs=inputs, latency=flags.latency, **asked)
            figures = {"model": model, **one}
        else:
            other, words, their = open_with_inputs(flags.against, where)
            figures = {
                "model": model,
                "against": flags.against,
                "before": run(other, words, inputs=their, **asked),
            }
            figures["after"] = run(network, tokenizer, inputs=inputs, **asked)
            if flags.latency:
                add_times(figures, other, network, their, flags.seqlen)
            figures["collapsed"] = alarms(figures)
    if flags.against is None:
        show(figures, shown.json, lambda console: print_measurement(figures, console, model))
    else:
        show(figures, shown.json, lambda console: print_comparison(figures, console))


@dataclass(frozen=True, kw_only=True)
class Inspect:
    """How the groups are shown."""

    html: str | None = flag("a self-contained HTML file with the groups as a picture", None)
    full: Annotated[bool, SWITCH] = flag(FULL, False)
    also: tuple[str, ...] | None = flag(ALSO_HELP, None)


def inspect(model: Annotated[str, MODEL], /, *, flags: Inspect, where: Where, shown: Shown) -> None:
    """Show what can be cut: groups, kinds, sizes, shares of the cost; and what cannot, and why."""
    from secateur.graph import trace
    from secateur.report.graph import describe_groups, write_graph
    from secateur.report.terminal import print_graph
    from secateur.utils.inputs import default_inputs

    check_new_file(flags.html, "--html")
    with quiet_stdout():
        network, _, inputs = open_with_inputs(model, where)
        inputs = default_inputs(network) if inputs is None else inputs
        graph = trace(network, inputs, also=further(network, flags.also))
        groups = {"model": model, **describe_groups(graph)}
        if flags.html:
            write_graph(Path(flags.html).expanduser(), graph, model)
            print(f"picture: {flags.html}", file=sys.stderr)
    show(groups, shown.json, lambda console: print_graph(groups, console, flags.full))
