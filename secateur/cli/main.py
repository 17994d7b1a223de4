"""The command line. Flags and their help are the dataclasses and signatures of the Python API.

Results go to stdout (with `--json` one JSON object and nothing else), progress and messages to stderr. Exit codes: 0; 1 where
a check of `doctor` failed; 2 for a user's mistake, which is one line; 130 after Ctrl-C. A bug keeps its traceback.
"""

from __future__ import annotations

import errno
import functools
import os
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cyclopts
from cyclopts import App

from secateur.cli import (
    catalogue,
    compare,
    demo,
    doctor,
    inspect,
    metanetwork,
    minigrid,
    objects,
    plan,
    prune,
    recipe,
    recover,
    saliency,
    scenes,
    token_modules,
    tokens,
    train,
)
from secateur.cli.flags import command, flag_names, named_method, on_off, settings
from secateur.cli.interrupt import INTERRUPTED, interrupted
from secateur.cli.shared import check_new_file, entries, method_entry, method_flags
from secateur.errors import SecateurError, nearest
from secateur.taxonomy import catalogue as data
from secateur.utils.about import __version__

MISTAKE = 2
HELP = """Find what is redundant in a neural network, cut it out, and see what the cut did.

Exit codes: 0; 1 where a check of doctor failed; 2 for a mistake that you can mend; 130 after Ctrl-C."""
VERBS: dict[str, Callable[..., Any]] = {
    "prune": prune.prune,
    "recover": recover.recover,
    "train-prune": train.train_prune,
    "tokens": tokens.tokens,
    "train scenes": scenes.train_scenes,
    "train metanetwork": metanetwork.train_metanetwork,
    "train minigrid": minigrid.train_minigrid,
    "train tokens": token_modules.train_tokens,
    "train sod": objects.train_sod,
    "saliency": saliency.saliency,
    "compare": compare.compare,
    "report": compare.report,
    "inspect": inspect.inspect,
    "measure": inspect.measure,
    "methods": catalogue.methods,
    "recommend": catalogue.recommend,
    "doctor": doctor.doctor,
    "demo": demo.demo,
    "unpack": plan.unpack,
    "plan show": plan.plan_show,
    "plan diff": plan.plan_diff,
    "plan apply": plan.plan_apply,
}
FOLDERS = {
    "train": "Train the models that come with the library, and heads that find objects.",
    "plan": "Show, compare and apply plans: what is kept, as data.",
}


def kinds_of(verb: str, argv: Sequence[str]) -> dict[str, type]:
    """The flags of a verb that the catalogue knows: options, recipes, filters, and the hyperparameters of the method it names."""
    function, method, shared = VERBS[verb], named_method(argv), data.catalogue()["settings"]
    method = None if method == prune.AUTO and verb == "prune" else method
    kinds: dict[str, type] = {}
    if verb == "prune":
        if method is None and any(token.lower().endswith((".onnx", ".pt2")) for token in argv[1:2]):
            method, kinds["flags"] = prune.FILE_METHOD, prune.PruneFile
        elif method is None and prune.cuts_tokens(argv):
            kinds["flags"] = prune.PruneTokens
        kinds["options"] = settings(shared["prune"], "Options", 2)
    elif verb == "train-prune":
        kinds["recipe"] = settings(shared["recipe"], "Recipe (default: the task's)", 2, optional=True)
        kinds["options"] = settings(shared["train-prune"], "Options", 3)
    elif verb == "train scenes":
        own = [row for row in shared["scenes"] if row["name"] not in ("variant", "seed")]
        kinds["settings"] = settings(own, "Training", 2)
    elif verb == "train metanetwork":
        own = [row for row in method_entry("metapruning")["settings"] if row["name"] not in metanetwork.LATER]
        kinds["settings"] = settings(own, "Metanetwork", 2)
        kinds["recipe"] = settings(
            shared["recipe"], "Recipe of the data models (default: the task's)", 3, optional=True
        )
    elif verb == "train minigrid":
        kinds["settings"] = settings(shared["minigrid"], "Training", 2)
    elif verb == "train tokens":
        kinds["recipe"] = settings(shared["recipe"], "Recipe (default: AdamW, batch 32)", 3, optional=True)
    elif verb == "methods":
        kinds["flags"] = catalogue.filter_flags()
    elif verb == "recommend":
        kinds["flags"] = catalogue.advice_flags()
    elif verb == "train sod":
        method = method or objects.DEFAULT
    elif verb == "saliency":
        method = None if objects.finds(argv) else method or saliency.DEFAULTS[saliency.reads_text(argv)]
    find = {"prune": method_entry, "train-prune": train.train_method, "tokens": tokens.token_method, "train tokens": tokens.token_method, "saliency": saliency.map_method, "train sod": objects.object_method}  # fmt: skip
    if method is not None and verb in find:
        taken = flag_names(function, *kinds.values())
        kinds["settings"] = method_flags(
            find[verb](method), taken, optional=verb == "saliency" and saliency.reads_text(argv)
        )
    return kinds


def build(argv: Sequence[str]) -> tuple[App, list[str]]:
    """The application, and the command line with `on` and `off` read; the verb gets the flags of the method it names."""
    plain = {"help_on_error": False, "result_action": "return_value"}
    app = App(name="secateur", version=__version__, help=HELP, suppress_keyboard_interrupt=False, **plain)  # type: ignore[arg-type]
    folders = {name: App(name=name, help=text) for name, text in FOLDERS.items()}
    line = shlex.join(["secateur", *argv])
    words = [token for token in argv if not token.startswith("-")]
    asked = " ".join(words[: 2 if words[:1] and words[0] in FOLDERS else 1])
    switches: dict[str, bool] = {}
    for verb, function in VERBS.items():
        folder, _, name = verb.rpartition(" ")
        parent = folders[folder] if folder else app
        done = functools.partial(keep_recipe, verb, argv)
        run = command(function, line, done, **(kinds_of(verb, argv) if verb == asked else {}))
        parent.command(run, name=name)
        if verb == asked:
            for argument in parent[name].assemble_argument_collection():
                if argument.hint in (bool, bool | None):
                    switches[argument.name] = bool(argument.negatives)
    for folder_app in folders.values():
        app.command(folder_app)
    app.register_install_completion_command(help="Complete verbs and flags with Tab: bash, zsh, fish.")
    return app, on_off(argv, switches)


def keep_recipe(
    verb: str, argv: Sequence[str], arguments: list[str], flags: dict[str, Any], save: str | None
) -> None:
    """Write the recipe of a run that ended into the folder of its result, and where --save-recipe says."""
    if int(os.environ.get("RANK", "0")):  # under torchrun the first process writes
        return
    _, out = recipe.without(argv, "--out")
    folder = Path(out).expanduser() if out else None
    if folder is not None and folder.is_dir():
        recipe.write(folder / recipe.NAME, verb, arguments, flags)
    if save is not None:
        recipe.write(save, verb, arguments, flags)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; gives the exit code: 0, 1 where `doctor` found a failure, 2 for anything that the user can mend,
    or 130 after Ctrl-C.

    >>> main(["methods", "--when", "PAT-PT", "--json"])  # doctest: +SKIP
    """
    words = list(sys.argv[1:] if argv is None else argv)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        words = recipe.expand(words, VERBS)
        check_new_file(recipe.without(words, recipe.WRITTEN)[1], recipe.WRITTEN)
        app, tokens = build(words)
        return app(tokens, exit_on_error=False, print_error=False) or 0
    except cyclopts.CycloptsError as error:
        return _fail(_explain(error, words))
    except SecateurError as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        return _fail(interrupted(words), INTERRUPTED)
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


def _explain(error: cyclopts.CycloptsError, argv: Sequence[str]) -> str:
    """What cyclopts found wrong, in one line."""
    text = " ".join(str(error).split())
    if isinstance(error, cyclopts.UnusedCliTokensError):
        return f"too many arguments: {' '.join(error.unused_tokens or [])}; --help shows what it takes"
    if isinstance(error, cyclopts.UnknownOptionError):
        name = error.token.keyword or ""
        field = name.removeprefix("--").replace("-", "_")
        # a hyperparameter of another method is likelier meant than a flag with a similar name
        owners = [m for m, entry in entries().items() if field in {row["name"] for row in entry["settings"]}]
        meant = re.search(r"Did you mean (--[\w-]+)", text)
        typo = meant is not None and nearest(name, [meant[1]], cutoff=0.9)
        if named_method(argv) is not None and owners and not typo:
            return (
                f"Unknown option: {name}, which belongs to {' and '.join(owners[:4])}; --help lists the flags"
            )
        return text if "Did you mean" in text else f"{text} --help lists the flags"
    return text


def _fail(message: str, code: int = MISTAKE) -> int:
    print(f"secateur: {' '.join(message.split())}", file=sys.stderr)
    return code
