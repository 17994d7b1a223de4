"""`secateur prune`."""

from __future__ import annotations

import dataclasses
import itertools
import os
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Group, Parameter

from secateur.cli.flags import OUTPUT, SWITCH, Settings, flag, listed
from secateur.cli.shared import (
    ALSO_HELP,
    JSON_HELP,
    LATENCY_HELP,
    MEASUREMENT,
    MODEL,
    OUT_HELP,
    REPORT_HELP,
    Drawn,
    Quality,
    Where,
    add_times,
    at_least,
    check_device,
    check_file_model,
    check_new_file,
    check_new_folder,
    check_written,
    further,
    is_exchange_or_gguf,
    open_model,
    open_with_inputs,
    quiet_stdout,
    show,
    write_model,
)
from secateur.errors import SecateurError, require

FILE_METHOD = "group-magnitude"
TOKENS = "token-frequency"
AUTO = "auto"
METHOD_HELP = (
    "the method: `secateur methods` lists them, or file.py:Class; auto: the one that fits the model, the target, the hardware"
    f" and the data; default for .onnx and .pt2: {FILE_METHOD}"
)
TARGET_HELP = "what holds at the end: 50% (share kept), 'params<=100e6', 'macs<=50%', 'size<=200MB', 'latency<=8ms', 2:4, 'encoder=80%,decoder=50%', vocabulary=16000 or vocabulary=used (the tokens that the text of --data uses)"
LISTS = ("kinds", "keep", "only", "share")
RECOVERY = Parameter(group=Group("Recovery", sort_key=3))


@dataclass(frozen=True, kw_only=True)
class Prune:
    """What is done."""

    target: str = flag(TARGET_HELP)
    method: str = flag(METHOD_HELP, AUTO)
    effort: Literal[1, 2, 3] = flag(
        "of auto: 1 the first candidate; 2 two are tried on held-out data; 3 three, and ways to divide the budget",
        1,
    )
    hardware: str | None = flag(
        "of auto: what the result runs on: cpu, gpu-dense (units leave), sparse, storage (single weights), gpu-2:4;"
        " default: where the model is",
        None,
    )
    data: str | None = flag(
        "calibration text: a .txt or .jsonl file, wikitext2, ..., hf:NAME:SPLIT:FIELD (package datasets), - (what is piped in);"
        " pictures with labels: cifar10, imagenet-sample, digits, camvid; default: a task's training data, or some English",
        None,
    )
    seed: int = flag("of everything that is drawn at random", 0)
    also: tuple[str, ...] | None = flag(ALSO_HELP, None)
    stream: Annotated[bool, SWITCH] = flag(
        "read a model folder block by block and write the result so, in the memory of two blocks",
        False,
    )


@dataclass(frozen=True, kw_only=True)
class PruneFile(Prune):
    """What is done to an .onnx or .pt2 file."""

    method: str = flag(METHOD_HELP, FILE_METHOD)


@dataclass(frozen=True, kw_only=True)
class PruneTokens(Prune):
    """What is done where the vocabulary alone is cut."""

    method: str = flag(METHOD_HELP, TOKENS)


@dataclass(frozen=True, kw_only=True)
class Recovery:
    """Training after the cut."""

    recover: Annotated[Literal["lora", "full"] | None, RECOVERY] = flag(
        "train what is left: low-rank updates that are merged, or all weights", None
    )
    steps: Annotated[int | None, RECOVERY] = flag(
        "training steps, of 8 windows each; default: 100 with --recover. Without it, steps mean --recover full --distill",
        None,
    )
    distill: Annotated[bool, RECOVERY, SWITCH] = flag(
        "learn from the dense model as well (keeps it in memory)", False
    )
    recover_lr: Annotated[float | None, RECOVERY] = flag(
        "learning rate; default: 3e-4 for lora, 3e-5 for full", None
    )

    def settled(self) -> Recovery:
        """With what follows from steps alone, and the default of steps."""
        if self.recover is None and self.steps is not None:
            return dataclasses.replace(self, recover="full", distill=True)
        return dataclasses.replace(self, steps=100) if self.steps is None else self


@dataclass(frozen=True, kw_only=True)
class Measured(Quality):
    """What is measured before and after, seconds included."""

    latency: Annotated[bool, MEASUREMENT, SWITCH] = flag(LATENCY_HELP, False)


@dataclass(frozen=True, kw_only=True)
class Output:
    """What is written, and how."""

    out: Annotated[str | None, OUTPUT] = flag(OUT_HELP, None)
    report: Annotated[str | None, OUTPUT] = flag(REPORT_HELP, None)
    packed: Annotated[bool, OUTPUT, SWITCH] = flag(
        "store zeros as a bit each: a folder that secateur.load reads and `secateur unpack` makes dense",
        False,
    )
    inplace: Annotated[bool, OUTPUT] = flag(
        "cut the loaded model itself; a copy takes twice the memory", True
    )
    resume: Annotated[bool, OUTPUT] = flag(
        "go on with an unfinished run of this command; no: start it again, and keep nothing of it", True
    )
    json: Annotated[bool, OUTPUT, SWITCH] = flag(JSON_HELP, False)


def prune(
    model: Annotated[str, MODEL],
    /,
    *,
    flags: Prune,
    settings: Settings,
    options: Settings,
    recovery: Recovery,
    measured: Measured,
    where: Where,
    drawn: Drawn,
    output: Output,
    line: str,
) -> None:
    """Make a model smaller.

    With --method NAME, --help shows the method's hyperparameters too.
    """
    from secateur.io.card import write_card
    from secateur.measure import measure as run_measure
    from secateur.method import make_method
    from secateur.pruning.auto import prune as run
    from secateur.pruning.request import read_request
    from secateur.pruning.vocabulary import TokenFrequency
    from secateur.report.html import library_versions, write_report
    from secateur.report.summary import alarms
    from secateur.report.terminal import print_report
    from secateur.tasks.registry import calibration_set
    from secateur.utils.inputs import map_ids
    from secateur.utils.progress import track

    check_new_folder(output.out)
    check_file_model(model, output.out)
    check_new_file(output.report)
    folder = output.out is not None and not is_exchange_or_gguf(output.out)
    require(folder or not output.packed, "it is for a folder", where="--packed", fix="give --out DIR")
    recovery = recovery.settled()
    lists = {name: listed(vars(options)[name]) or None for name in LISTS}
    for name, given in lists.items():  # an unset variable of the shell must not protect nothing
        require(given or vars(options)[name] is None, "it is empty", where=f"--{name}", fix="leave it out")
    common = vars(options) | lists
    at_least("--steps", recovery.steps, 1)
    asked = drawn.asked
    check_target(flags.target)
    chosen: dict[str, Any] = {"method": AUTO, "effort": flags.effort, "hardware": flags.hardware}
    if flags.method != AUTO:
        unused = flags.effort == 1 and flags.hardware is None
        fix = "leave out --method"
        require(unused, "they choose a method, and it is named", where="--effort, --hardware", fix=fix)
        named = TokenFrequency() if flags.method == TOKENS else make_method(flags.method, **vars(settings))
        chosen = {"method": named}
        read_request("prune", named, flags.target, common)
    tokens = flags.method == TOKENS or "vocabulary" in (common["kinds"] or ())
    fix = "leave --distill out, or cut the vocabulary afterwards"
    whole = not (tokens and recovery.distill)
    require(whole, "the dense model has another vocabulary", where="--distill", fix=fix)
    measured.check()
    alone = int(os.environ.get("WORLD_SIZE", "1")) < 2
    require(alone, "it is one process's work", where="prune under torchrun", fix="start it without, and train the result: torchrun ... -m secateur recover")  # fmt: skip
    fix = "leave --stream out"
    require(not (tokens and flags.stream), "the vocabulary is cut in memory", where="--stream", fix=fix)
    if flags.stream:
        report = _stream(model, flags, common | vars(settings), recovery, measured, where, output)
        report |= {"command": line, "versions": library_versions()}
        write_card(Path(output.out or "").expanduser(), report, report["artefact"])
        show(report, output.json, lambda console: print_report(report, console))
        return
    with quiet_stdout():
        network, tokenizer, inputs = open_with_inputs(model, where)
        check_written(network, tokenizer, output.out)
        seqlen = common["seqlen"]
        data = flags.data or calibration_set(model)
        pruned = run(
            network,
            inputs,
            **chosen,
            target=flags.target,
            data=data,
            also=further(network, flags.also),
            seed=flags.seed,
            tokenizer=tokenizer,
            inplace=output.inplace and flags.effort == 1 and not (recovery.recover and recovery.distill),
            rollback=False,
            resume=output.resume,
            progress=track,
            announce=lambda text: print(text, file=sys.stderr),
            **measured.asked,
            **asked,
            **common,
        )
        report = pruned.report
        if recovery.recover:
            _recover(pruned, recovery, network, data, flags.seed)
            if (kept := pruned.plan.tokens) is not None and inputs is not None:
                inputs = map_ids(inputs, lambda ids: ids % len(kept))
            after = run_measure(
                pruned.model, inputs=inputs, tokenizer=pruned.tokenizer, seqlen=seqlen, **measured.asked
            )
            report["cut"], report["after"] = report["after"], after
        if measured.latency:
            dense = open_model(model, where.device, where.dtype)[0] if pruned.model is network else network
            add_times(report, dense, pruned.model, inputs, seqlen)
            del dense
        report["collapsed"] = alarms(report)
        report |= {"model": model, "out": output.out, "command": line, "versions": library_versions()}
        if output.out:
            write_model(pruned, inputs, output.out, output.packed)
            print(f"model: {output.out}", file=sys.stderr)
        if output.report:
            scores = {name: values.tolist() for name, values in pruned.scores.items()}
            write_report(Path(output.report).expanduser(), {**report, "scores": scores}, pruned.plan)
            print(f"report: {output.report}", file=sys.stderr)
    show(report, output.json, lambda console: print_report(report, console))


def _stream(
    model: str,
    flags: Prune,
    settings: dict[str, Any],
    recovery: Recovery,
    measured: Measured,
    where: Where,
    output: Output,
) -> Any:
    """`prune_folder`; refuses what needs the model in memory."""
    from secateur.io.folder import prune_folder
    from secateur.tasks.models import NAMES, model_folder, smollm2_folder
    from secateur.utils.progress import track

    others = {"--recover": recovery.recover, "--latency": measured.latency, "--tasks": measured.tasks,
              "--report": output.report, "--packed": output.packed, "--also": flags.also, "--input-shape": where.input_shape,
              "--dtype": where.dtype}  # fmt: skip
    for name, given in others.items():
        fix = (
            "measure and train the result afterwards"
            if name[2:] in ("recover", "latency", "tasks")
            else "leave it out"
        )
        require(not given, "it needs the model in memory", where=f"{name} with --stream", fix=fix)
    require(flags.method != AUTO, "it takes one method", where="--stream", fix="name it: --method wanda")
    require(output.out, "the result is a folder", where="--stream", fix="give --out DIR")
    require(
        not is_exchange_or_gguf(output.out or ""),
        "the result is a folder",
        where=f"--out {output.out}",
        fix="give a folder",
    )
    named = model in NAMES and model != "smollm2" and not Path(model).is_dir()
    require(
        not named, "it is no folder with shards", where=f"{model} with --stream", fix="leave out --stream"
    )
    check_device(where.device)
    with quiet_stdout():
        return prune_folder(
            smollm2_folder() if model == "smollm2" else model_folder(model),
            output.out or "",
            method=flags.method,
            target=flags.target,
            data=flags.data,
            seed=flags.seed,
            device=where.device or "cpu",
            resume=output.resume,
            progress=track,
            announce=lambda text: print(text, file=sys.stderr),
            **settings,
        )


def _recover(pruned: Any, recovery: Recovery, dense: Any, data: Any, seed: int) -> None:
    """Train the pruned model on the calibration text; what was trained goes into the report."""
    from secateur.data import calibration_batches
    from secateur.training.recover import recover

    options = pruned.report["options"]
    steps = recovery.steps or 100
    samples = max(options["samples"], min(8 * steps, 1024))
    windows = calibration_batches(data, pruned.tokenizer, pruned.model, samples, options["seqlen"], seed)
    start = time.perf_counter()
    losses = recover(
        pruned.model,
        windows,
        how=recovery.recover or "lora",
        steps=steps,
        lr=recovery.recover_lr,
        teacher=dense if recovery.distill else None,
        masks=pruned.plan.masks,
        seed=seed,
    )
    pruned.report["recovery"] = {**dataclasses.asdict(recovery), "losses": losses}
    pruned.report["seconds"] += time.perf_counter() - start


def cuts_tokens(argv: Sequence[str]) -> bool:
    """Whether a command line asks for a cut of the vocabulary alone, in which no method has a part."""
    values = [value for token in argv for value in (token, token.partition("=")[2])]
    named = [b for a, b in itertools.pairwise(argv) if a == "--kinds"]
    named += [token.partition("=")[2] for token in argv if token.startswith("--kinds=")]
    counted = any(re.fullmatch(r"\s*vocabulary\s*=.*", value) for value in values)
    return counted or (bool(named) and all(name.strip() == "vocabulary" for name in named))


def check_target(text: str) -> None:
    """Read the target before anything is loaded, and say what it was taken for where it could mean two things."""
    from secateur.pruning.target import parse_target

    if text.strip().lower() in ("params", "macs", "size", "latency"):
        raise SecateurError(
            f"{text!r} has no limit",
            where="target",
            fix=f"quote it, the shell reads < and >: --target '{text}<=50%'",
        )
    if meaning := parse_target(text).meaning:
        print(meaning, file=sys.stderr)
