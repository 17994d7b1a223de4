"""`secateur recover`: a pruned model trains on, alone or in several processes."""

from __future__ import annotations

import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from secateur.cli.flags import OUTPUT, SWITCH, flag
from secateur.cli.shared import (
    DEVICE_HELP,
    MODEL,
    Shown,
    at_least,
    check_new_folder,
    is_exchange_or_gguf,
    open_model,
    quiet_stdout,
    show,
)
from secateur.errors import require


@dataclass(frozen=True, kw_only=True)
class Recover:
    """What is trained, and on what."""

    out: str = flag("a new folder for the result")
    how: Literal["lora", "full"] = flag("low-rank updates that are merged at the end, or all weights", "full")
    steps: int = flag("training steps", 100)
    batch: int = flag("windows in a step, over all processes", 8)
    lr: float | None = flag("learning rate; default: 3e-4 for lora, 3e-5 for full", None)
    teacher: str | None = flag("the dense model, which it learns from beside the data", None)
    distill: float = flag("the teacher's part in the loss, 0..1", 0.5)
    data: str | None = flag("text, as for `secateur prune`; default: some English", None)
    samples: int = flag("windows of text", 256)
    seqlen: int = flag("tokens in a window", 512)
    seed: int = flag("of everything that is drawn at random", 0)
    shard: Annotated[bool, SWITCH] = flag(
        "under torchrun: each process holds its share of weights, moments and gradients, and of the teacher (FSDP); without it each holds all",
        False,
    )
    every: int = flag("steps between checkpoints", 100)
    resume: Annotated[bool, OUTPUT] = flag("go on with a run that was stopped", True)
    device: str | None = flag(DEVICE_HELP, None)


def recover(
    model: Annotated[str, Parameter(help=f"a pruned folder, or any model: {MODEL.help}")],
    /,
    *,
    flags: Recover,
    shown: Shown,
    line: str,
) -> None:
    """Train what is left of a pruned model. Weights that are zero stay zero. Under torchrun the batches are shared by its processes."""
    from secateur.data import calibration_batches
    from secateur.graph.blocks import find_matrices
    from secateur.io.artefact import save_model
    from secateur.training.parallel import is_main, local_device
    from secateur.training.recover import recover as run

    for name in ("steps", "batch", "samples", "every"):
        at_least(f"--{name}", getattr(flags, name), 1)
    require(not is_exchange_or_gguf(flags.out), "the result is a folder", where=f"--out {flags.out}", fix="give a folder")  # fmt: skip
    work = Path(flags.out).expanduser().with_name(f"{Path(flags.out).name}.run")
    if is_main():
        check_new_folder(flags.out)
    start = time.perf_counter()
    with quiet_stdout():
        device = str(local_device(flags.device or "cpu"))
        network, tokenizer = open_model(model, "cpu" if flags.shard else device, None)
        words = getattr(getattr(network, "config", None), "vocab_size", None)
        require(words is not None, f"{type(network).__name__} is no language model", where="recover", fix="train it in Python: secateur.training.recover")  # fmt: skip
        teacher = None if flags.teacher is None else open_model(flags.teacher, "cpu" if flags.shard else device, None)[0]  # fmt: skip
        data = calibration_batches(flags.data, tokenizer, network, flags.samples, flags.seqlen, flags.seed)
        zeros = {n: m.parameter.detach() != 0 for n, m in find_matrices(network).items()}
        masks = {name: kept for name, kept in zeros.items() if not kept.all()}
        if is_main():
            if not flags.resume:
                shutil.rmtree(work, ignore_errors=True)
            work.mkdir(parents=True, exist_ok=True)
        losses = run(
            network,
            data,
            how=flags.how,
            steps=flags.steps,
            batch=flags.batch,
            lr=flags.lr,
            teacher=teacher,
            distill=flags.distill,
            masks=masks,
            shard=device if flags.shard else False,
            seed=flags.seed,
            checkpoint=work / "recover.safetensors",
            every=flags.every,
            about={"distill": [flags.teacher, flags.distill]},
        )
        if not is_main():
            return
        report: dict[str, Any] = {
            "model": model,
            "out": flags.out,
            "teacher": flags.teacher,
            "losses": losses,
            "command": line,
        }
        report |= {"seconds": time.perf_counter() - start}
        report["artefact"] = save_model(network, flags.out, tokenizer=tokenizer, report=report)
        shutil.rmtree(work, ignore_errors=True)
        print(f"model: {flags.out}", file=sys.stderr)
    show(report, shown.json, lambda console: console.print(f"loss {losses[0]:.4g} at the first of {len(losses)} steps, {losses[-1]:.4g} at the last"))  # fmt: skip
