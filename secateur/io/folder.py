"""`prune_folder`: a model folder pruned block by block, from its shards to a new folder, without ever being loaded whole."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
import shutil
import time
from collections.abc import Callable, Container, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.data import calibration_batches
from secateur.errors import require
from secateur.graph.novices import KIND
from secateur.io.by_block import Blocks, check_units, forget_steps
from secateur.io.card import write_card
from secateur.io.hollow import as_stored, empty_model, rows_apart
from secateur.io.per_layer import FOLDER
from secateur.io.renamed import Renamed, named
from secateur.io.shards import Shards
from secateur.io.streamed import Streamed, tensors_of
from secateur.io.transformers import load_tokenizer
from secateur.method import Method
from secateur.pruning.context import Context
from secateur.pruning.method import UnitMethod, WeightMethod
from secateur.pruning.plan import Plan
from secateur.pruning.prune import TRACED
from secateur.pruning.report import Report, build_report
from secateur.pruning.request import Request, read_request
from secateur.pruning.resume import Checkpoint, fingerprint
from secateur.pruning.target import Target
from secateur.pruning.weights import plan_weights, reads_data
from secateur.stats.layer import OF_GRADIENTS
from secateur.stats.memory import estimate
from secateur.utils.files import atomic_write_json, atomic_write_text, explain_oserror
from secateur.utils.inputs import default_inputs

BESIDE = ("*.json", "*.txt", "*.model", "*.jinja", "modeling_pruned.py")
NOT_BESIDE = ("model.safetensors.index.json", "plan.json", "report.json", "recipe.yaml")
BUILDS = ("config.json", "modeling_pruned.py")
"""What says how a model is built; written anew where its shapes change."""
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
    """Prune a model folder in the memory of two blocks; gives the report that lies in `out`.

    >>> secateur.prune_folder("llama-70b", "small", method="wanda", target="50%", data="brown")  # doctest: +SKIP
    >>> secateur.prune_folder("llama-70b", "small", method="flap", target="80%", data="brown")  # doctest: +SKIP

    Blocks are read from the folder's safetensors, computed in float32, and written in the dtypes they had. What is computed is
    what `prune` computes in float32. Where single weights are set to zero the result has the same files, and no plan: its masks
    are the zeros. Where units leave it has what `Pruned.save` writes, and every block is read twice, to score and to cut it. Finished
    blocks lie in `OUT.run` until the end, so a run that was killed goes on where it was, to the same bits.

    Parameters
    ----------
    folder, out: of transformers, with safetensors; a new folder.
    method: one that looks at one block at a time: of those for single weights without gradients and without an allocation over all
        layers; of those for units the ones whose `by_block` is true (`flap`, `minitron`, `shortgpt`, `reap`, ...), with units that lie in
        one block, or whole blocks.
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
    source = named(source, model)
    batches = None
    if options.fits or reads_data(chosen, options.divides):
        require(data != "self", "the model can't write text block by block", where="data", fix="give a text")
        tokenizer = load_tokenizer(Path(folder).expanduser())
        batches = calibration_batches(data, tokenizer, model, options.samples, options.seqlen, seed)
    work = where.with_name(f"{where.name}.run")
    units = isinstance(chosen, UnitMethod)
    inputs = default_inputs(model, min(options.seqlen, TRACED)) if units else None
    context = Context(
        model,
        chosen,
        request.target,
        inputs,
        data=batches,
        seed=seed,
        options=options,
        progress=progress,
        lean=True,
        recorded=False,
    )
    if units:  # on shapes alone; what the target counts is a matter of the files
        tensors_of(model, source)
        with rows_apart(model):
            _ = context.graph, context.every_matrix
        as_stored(model, source)
    streamed = Streamed(model, source, work, dense=units)
    context.ready, context.original = streamed.enter, streamed.original
    context.checkpoint = Checkpoint(work) if units else _Finished(streamed)
    blocks = Blocks(context, streamed) if units else None
    _check_room(work, source)
    asked = (chosen.name, chosen.source, chosen.hyperparameters, str(request.target))
    read_from = fingerprint(torch.nn.Module(), batches)
    _begin(work, _digest(source, *asked, dataclasses.asdict(options), seed, read_from), resume)
    if isinstance(source, Renamed):
        source.forget_put_back(work)
    with torch.no_grad():
        if announce is not None:
            announce(_memory(context, streamed, batches, blocks))
        if blocks is not None:
            plan = blocks.plan()
            about = blocks.cut(plan)
        else:
            plan, about = _zero(context, streamed)
    report = _report(context, streamed, plan, request)
    report |= {
        "model": str(folder),
        "out": str(out),
        "seconds": time.perf_counter() - started,
        "artefact": about,
    }
    if isinstance(source, Renamed) and about["form"] == "plain":
        source.put_back(work)
    _copy(Path(folder).expanduser(), work, anew=BUILDS if units else ())
    if units:
        forget_steps(work)
        plan.save(work)
    atomic_write_json(work / "report.json", report)
    write_card(work, report, about)
    (work / RUN).unlink()
    with explain_oserror(where):
        if where.is_dir():
            where.rmdir()
        os.rename(work, where)
    return report


def _zero(context: Context, streamed: Streamed) -> tuple[Plan, dict[str, Any]]:
    """Single weights, block by block; the blocks that hold nothing to prune are written too."""
    assert isinstance(context.method, WeightMethod)
    plan = plan_weights(context.method, context)
    for number in range(len(streamed.modules)):
        if not streamed.file(number).exists():
            streamed.enter(number)
            streamed.finish(number)
    streamed.close()
    folder = streamed.source.folder
    custom, layers = (folder / "modeling_pruned.py").is_file(), (folder / FOLDER).is_dir()
    load = f"from_pretrained(folder{', trust_remote_code=True' if custom else ''})"
    about = {"form": "custom" if custom else "plain", "load": load, "why": None}
    return plan, about | ({"per_layer_config": f"{FOLDER}/config.json"} if layers else {})


def _check(request: Request) -> None:
    method, options, fix = request.method, request.options, "prune it without --stream"
    name = method.name
    require(
        options.schedule == "once", "rounds would read the model several times", where="schedule", fix="once"
    )
    if isinstance(method, UnitMethod):
        check_units(method, request.target.kind, options)
        return
    assert isinstance(method, WeightMethod)
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
    files = {entry.file for entry in source.stored.values()}
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


def _memory(context: Context, streamed: Streamed, batches: Any, blocks: Blocks | None) -> str:
    """What is told before the run starts."""
    streamed.enter(0)
    if blocks is not None and blocks.passes != "inputs":
        work = blocks.memory()
    else:
        work = estimate(context.model, batches, context.method.statistics(), context.every_matrix)
    return (
        f"needs about {(streamed.resident + work) / 1e6:,.0f} MB beside the libraries, two blocks in float32 at a time;"
        f" the whole model has {streamed.source.nbytes / 1e6:,.0f} MB on disk"
    )


def _report(context: Context, streamed: Streamed, plan: Plan, request: Request) -> Report:
    """Counted in the files: zeros before and after."""
    written = named(Shards(streamed.folder), context.model)
    left = {name: _nonzero(written, name) for name in written.entries}
    kept = {n: (math.prod(e.shape), left[n]) for n, e in written.entries.items() if n in context.every_matrix}
    was = {name: _nonzero(streamed.source, name) for name in streamed.source.entries}
    units = isinstance(context.method, UnitMethod)
    sides = [
        _figures(context, shards, found, buffers, kept_units if units else None)
        for shards, found, buffers, kept_units in (
            (streamed.source, was, streamed.buffers, {}),
            (written, left, dict(context.model.named_buffers()), plan.keep),
        )
    ]
    report = build_report(
        context.method, request.target, plan, context.graph if units else None, *sides,
        options=dataclasses.asdict(request.options), refused={}, skipped=context.skipped, parts=(),
        kinds=request.options.kinds or getattr(context.method, "kinds", None) if units else None,
        kept_share=context.keeps_share(plan.keep) if units and request.target.kind == "share" else True,
    )  # fmt: skip
    if units:
        return report
    total = sum(math.prod(entry.shape) for entry in written.entries.values())
    report["weights"] += [{"name": n, "size": size, "kept": left} for n, (size, left) in kept.items()]
    sizes, stays = (sum(values) for values in zip(*kept.values()))
    goal = request.target
    asked = goal.limit(total) - (total - sizes) if goal.kind == "params" else goal.value * sizes
    report["met"] = not context.skipped and stays <= asked + 1e-6
    return report


def _nonzero(shards: Shards, name: str) -> int:
    return int(shards.read([name])[name].count_nonzero())


def _figures(
    context: Context, shards: Shards, nonzero: dict[str, int], buffers: Container[str], keep: Any
) -> dict[str, Any]:
    """What the files tell of a model; multiply-adds where units leave, by the graph."""
    unmeasured = dict.fromkeys(
        ["peak_memory_bytes", *(["macs"] if keep is None else [])], "the model wasn't loaded"
    )
    if keep and any(context.graph[name].kind == KIND and not context.graph[name].modules for name in keep):
        keep, unmeasured["macs"] = None, "it depends on how many tokens are sent to vectors"
    return {
        "params": sum(math.prod(entry.shape) for n, entry in shards.entries.items() if n not in buffers),
        "params_nonzero": sum(count for name, count in nonzero.items() if name not in buffers),
        "size_bytes": shards.nbytes,
        "macs": None if keep is None else context.graph.macs(keep),
        "perplexity": {},
        "accuracy": {},
        "psnr": {},
        "latency": {},
        "peak_memory_bytes": None,
        "seqlen": context.options.seqlen,
        "not_measured": unmeasured,
    }


def _copy(folder: Path, work: Path, anew: tuple[str, ...]) -> None:
    """Config, tokenizer and the like, as they are, without what is written anew."""
    for pattern in BESIDE:
        for file in folder.glob(pattern):
            if file.name not in (*NOT_BESIDE, *anew):
                shutil.copyfile(file, work / file.name)
    if (layers := folder / FOLDER / "config.json").is_file() and not anew:
        (work / FOLDER).mkdir(exist_ok=True)
        shutil.copyfile(layers, work / FOLDER / "config.json")
