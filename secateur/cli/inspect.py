"""`secateur measure` and `secateur inspect`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from secateur.cli.flags import listed
from secateur.cli.shared import check_measurement, check_new_file, example, open_model, quiet_stdout, show


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
    from secateur.report.graph import describe_groups, write_graph
    from secateur.report.terminal import print_graph
    from secateur.utils.inputs import default_inputs

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
