"""`prune_folder`: a model folder pruned block by block, from its shards to a new folder, without ever being loaded whole."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
import shutil
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.data import calibration_batches
from secateur.errors import SecateurError, require
from secateur.io.shards import Shards
from secateur.io.streamed import Streamed, empty_model
from secateur.io.transformers import load_tokenizer
from secateur.method import Method
from secateur.pruning.context import Context
from secateur.pruning.method import WeightMethod
from secateur.pruning.plan import Plan
from secateur.pruning.report import Report, build_report
from secateur.pruning.request import Request, read_request
from secateur.pruning.resume import Checkpoint, fingerprint
from secateur.pruning.target import Target
from secateur.pruning.weights import plan_weights, reads_data
from secateur.stats.layer import OF_GRADIENTS
from secateur.stats.memory import estimate
from secateur.utils.files import atomic_write_json, atomic_write_text, explain_oserror

BESIDE = ("*.json", "*.txt", "*.model", "*.jinja", "modeling_pruned.py")
NOT_BESIDE = ("model.safetensors.index.json", "plan.json", "report.json", "recipe.yaml")
ALL_AT_ONCE = ("global", "per-kind", "per-part", "owl", "coarse-to-fine", "own")
"""Allocations that look at all layers before the first is cut."""
RUN = "run.txt"
"""Holds the fingerprint of the run whose shards lie beside it."""


class _Finished(Checkpoint):
    """Blocks that are done are shards of the result."""

    def __init__(self, streamed: Streamed):
        super().__init__(None)
        self.streamed = streamed

    def load(self, key: str) -> dict[str, Tensor] | None:
        return {} if self.streamed.file(_number(key)).exists() else None

    def save(self, key: str, tensors: dict[str, Tensor]) -> None:
        self.streamed.finish(_number(key))


def _number(key: str) -> int:
    return int(key.rpartition("-")[2])


def prune_folder(
    folder: str | Path,
    out: str | Path,
    *,
    method: str | Method,
    target: str | float | Target,
    data: Any = None,
    seed: int = 0,
    device: str | torch.device = "cpu",
    resume: bool = True,
    progress: Callable[..., Iterable] | None = None,
    announce: Callable[[str], None] | None = None,
    **settings: Any,
) -> Report:
    """Set single weights of a model folder to zero, in the memory of two blocks; gives the report that lies in `out`.

    >>> secateur.prune_folder("llama-70b", "small", method="wanda", target="50%", data="brown")  # doctest: +SKIP

    Blocks are read from the folder's safetensors, computed in float32, and written in the dtypes they had; the result has the
    same files, and no plan: its masks are the zeros. What is computed is what `prune` computes in float32. Finished blocks
    lie in `OUT.run` until the end, so a run that was killed goes on where it was, to the same bits.

    Parameters
    ----------
    folder, out: of transformers, with safetensors; a new folder.
    method: one that removes single weights and looks at one block at a time: no gradients, no allocation over all layers.
    data: token ids [samples, length], a list of model inputs, a text file, or the name of a text.
    device: where blocks are computed.
    announce: called with a line about the memory that is needed, before anything is done.
    settings: fields of `Options` and hyperparameters of the method.

    Raises `SecateurError`: a method or option that needs the whole model, shards that are missing or cut off, no room on the
    disk. Neither folder is touched then, and what is finished stays in `OUT.run`.
    """
    started = time.perf_counter()
    request = read_request("prune", method, target, settings)
    _check(request)
    source, where = Shards(folder), Path(os.path.realpath(Path(out).expanduser()))
    require(not where.exists() or (where.is_dir() and not any(where.iterdir())), "the folder is not empty", where=str(out), fix="give a new folder")  # fmt: skip
    model, chosen, options = empty_model(folder, device), request.method, request.options
    assert isinstance(chosen, WeightMethod)
    batches = None
    if options.fits or reads_data(chosen, options.divides):
        require(data != "self", "the model can't write text block by block", where="data", fix="give a text")
        tokenizer = load_tokenizer(Path(folder).expanduser())
        batches = calibration_batches(data, tokenizer, model, options.samples, options.seqlen, seed)
    work = where.with_name(f"{where.name}.run")
    streamed = Streamed(model, source, work)
    _check_room(work, source)
    asked = (chosen.name, chosen.source, chosen.hyperparameters, str(request.target))
    read_from = fingerprint(torch.nn.Module(), batches)
    _begin(work, _digest(source, *asked, dataclasses.asdict(options), seed, read_from), resume)
    context = Context(
        model,
        chosen,
        request.target,
        None,
        data=batches,
        seed=seed,
        options=options,
        progress=progress,
        checkpoint=_Finished(streamed),
        lean=True,
        recorded=False,
        ready=streamed.enter,
        original=streamed.original,
    )
    with torch.no_grad():
        if announce is not None:
            announce(_memory(context, streamed, batches))
        plan = plan_weights(chosen, context)
        for number in range(len(streamed.modules)):  # blocks that hold nothing to prune
            if not streamed.file(number).exists():
                streamed.enter(number)
                streamed.finish(number)
    streamed.close()
    report = _report(context, streamed, plan, request)
    report |= {"model": str(folder), "out": str(out), "seconds": time.perf_counter() - started}
    custom = (Path(folder).expanduser() / "modeling_pruned.py").is_file()
    load = f"from_pretrained(folder{', trust_remote_code=True' if custom else ''})"
    report["artefact"] = {"form": "custom" if custom else "plain", "load": load, "why": None}
    _copy(Path(folder).expanduser(), work)
    atomic_write_json(work / "report.json", report)
    (work / RUN).unlink()
    with explain_oserror(where):
        if where.is_dir():
            where.rmdir()
        os.rename(work, where)
    return report


def _check(request: Request) -> None:
    method, options, fix = request.method, request.options, "prune it without --stream"
    name = method.name
    if not isinstance(method, WeightMethod):
        raise SecateurError(
            f"{name} removes units, and their groups are traced with the whole model in memory", where="stream", fix=fix
        )  # fmt: skip
    gradients = method.statistics() & OF_GRADIENTS
    require(
        not gradients, f"{name} needs gradients, which run through the whole model", where="stream", fix=fix
    )
    own = {"global": "global", "part": "per-part"}.get(method.scope)
    divided = (own or options.divides or method.allocation).partition(":")
    whole = divided[0] in ALL_AT_ONCE or (divided[0] == "arithmetic" and not divided[2])
    says = "allocation=uniform divides the budget without a look" if not own else fix
    require(
        not whole,
        f"{name} divides its budget ({divided[0]}) by a look at all layers first",
        where="stream",
        fix=says,
    )
    require(
        options.repair != "bias", "the shards have no room for new biases", where="repair", fix="repair=obs"
    )
    require(
        options.schedule == "once", "rounds would read the model several times", where="schedule", fix="once"
    )
    require(
        not options.everywhere, "the head isn't read block by block", where="everywhere", fix="leave it out"
    )


def _begin(work: Path, digest: str, resume: bool) -> None:
    """The folder of the run; that of another run, or one that isn't to go on, is emptied."""
    with explain_oserror(work):
        mark = work / RUN
        ours = mark.is_file() and mark.read_text() == digest
        if work.exists() and not (ours and resume):
            named = mark.is_file() or not any(work.iterdir())
            require(
                named, "it isn't a run of secateur", where=str(work), fix="remove it, or give another --out"
            )
            shutil.rmtree(work)
        work.mkdir(parents=True, exist_ok=True)
        atomic_write_text(mark, digest)


def _digest(source: Shards, *parts: Any) -> str:
    """What decides the result, without reading the weights: names, sizes and times of the shards, and what was asked."""
    files = {entry.file for entry in source.entries.values()}
    stats = sorted((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files)
    return hashlib.sha256(repr((stats, parts)).encode()).hexdigest()


def _check_room(work: Path, source: Shards) -> None:
    done = sum(file.stat().st_size for file in work.glob("*.safetensors"))
    place = next(path for path in (work, *work.parents) if path.exists())
    free, needed = shutil.disk_usage(place).free, source.nbytes - done
    require(
        free > needed,
        f"the disk has {free / 1e9:.1f} GB left, the result needs {needed / 1e9:.1f} GB",
        where=str(work),
        fix="free some space, or write elsewhere",
    )


def _memory(context: Context, streamed: Streamed, batches: Any) -> str:
    """What is told before the run starts."""
    needs = context.method.statistics()
    streamed.enter(0)
    work = estimate(context.model, batches, needs, context.every_matrix)
    return (
        f"needs about {(streamed.resident + work) / 1e6:,.0f} MB beside the libraries, two blocks in float32 at a time;"
        f" the whole model has {streamed.source.nbytes / 1e6:,.0f} MB on disk"
    )


def _report(context: Context, streamed: Streamed, plan: Plan, request: Request) -> Report:
    """Counted in the files: zeros before and after."""
    kept: dict[str, tuple[int, int]] = {}
    total = before = after = 0
    written = Shards(streamed.folder)
    for name in written.entries:
        was, left = (int(shards.read([name])[name].count_nonzero()) for shards in (streamed.source, written))
        size = math.prod(written.entries[name].shape)
        total, before, after = total + size, before + was, after + left
        if name in context.every_matrix:
            kept[name] = (size, left)
    figures: dict[str, Any] = {
        "params": total,
        "size_bytes": streamed.source.nbytes,
        "macs": None,
        "perplexity": {},
        "accuracy": {},
    }
    figures |= {"psnr": {}, "latency": {}, "peak_memory_bytes": None, "seqlen": context.options.seqlen}
    figures["not_measured"] = dict.fromkeys(("macs", "peak_memory_bytes"), "the model wasn't loaded")
    sides = [{**figures, "params_nonzero": count} for count in (before, after)]
    options = dataclasses.asdict(request.options)
    report = build_report(
        context.method, request.target, plan, None, *sides, options=options, kinds=None, kept_share=True,
        refused={}, skipped=context.skipped, parts=(),
    )  # fmt: skip
    report["weights"] += [{"name": n, "size": size, "kept": left} for n, (size, left) in kept.items()]
    sizes, left = (sum(values) for values in zip(*kept.values()))
    goal = request.target
    asked = goal.limit(total) - (total - sizes) if goal.kind == "params" else goal.value * sizes
    report["met"] = not context.skipped and left <= asked + 1e-6
    return report


def _copy(folder: Path, work: Path) -> None:
    """Config, tokenizer and the like, as they are."""
    for pattern in BESIDE:
        for file in folder.glob(pattern):
            if file.name not in NOT_BESIDE:
                shutil.copyfile(file, work / file.name)
