"""The command line. Flags and their help are the dataclasses and signatures of the Python API.

Results go to stdout (with `--json` one JSON object and nothing else), progress and messages to stderr. A user's mistake
is one line and exit code 2; a check of `doctor` that failed is exit code 1; a bug keeps its traceback.
"""

from __future__ import annotations

import dataclasses
import errno
import inspect
import os
import re
import sys
from collections.abc import Sequence

import cyclopts
from cyclopts import App

from secateur import __version__
from secateur.cli import doctor, saliency, scenes, train
from secateur.cli import tokens as visual_tokens
from secateur.cli.catalogue import _advice, _filters, methods, recommend
from secateur.cli.flags import (
    command,
    flag,
    named_method,
    on_off,
    switches_of,
    word,
)
from secateur.cli.inspect import inspect_model, measure
from secateur.cli.plan import plan_apply, plan_diff, plan_show
from secateur.cli.prune import FILE_METHOD, prune, prune_parameters
from secateur.cli.shared import JSON, LATENCY, LIMIT, MISTAKE, MODEL, OUT_HELP, SEQLEN, TASKS, WHERE, _argv
from secateur.errors import SecateurError

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
