"""`prune_with`: one call from a model and a target to a smaller model, the plan that made it, and a report."""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.data import calibration_batches
from secateur.errors import SecateurError
from secateur.families.pipelines import as_module
from secateur.graph import Graph, trace
from secateur.graph.attentions import attention_groups
from secateur.graph.novices import novice_groups
from secateur.io.artefact import save_model
from secateur.measure import latency, measure
from secateur.measure.cost import counting
from secateur.method import Method
from secateur.pruning.checks import Buffers, check_forward, check_model, check_tensors, check_traced
from secateur.pruning.context import Context
from secateur.pruning.method import UnitMethod, WeightMethod
from secateur.pruning.plan import Plan
from secateur.pruning.protect import check_patterns
from secateur.pruning.report import Report, build_report
from secateur.pruning.request import read_request
from secateur.pruning.resume import Checkpoint, fingerprint, run_directory
from secateur.pruning.share import read_shares
from secateur.pruning.target import Target, parse_schedule, rounds
from secateur.pruning.tokens import KIND, rank_tokens
from secateur.pruning.undo import Undo
from secateur.pruning.units import plan_units
from secateur.pruning.weights import plan_weights, reads_data
from secateur.surgery import cut_units
from secateur.surgery.changes import set_values
from secateur.surgery.tokenizer import trim_tokenizer
from secateur.utils.inputs import Inputs, default_inputs, from_description, map_ids, map_tensors
from secateur.utils.running import device_of
from secateur.utils.screen import HEIGHT, fit
from secateur.utils.types import Objective

TRACED = 128
"""Tokens of the example input that a language model is traced, proved and counted on."""


@dataclass(repr=False)
class Pruned:
    """What `secateur.prune` gives: the model, the plan that made it, the graph it was cut along, and a JSON-able report.

    `scores` are those that a structured method's budget was divided by, [units] per group.
    """

    model: nn.Module
    plan: Plan
    report: Report
    tokenizer: Any = None
    dense_config: Any = None
    scores: dict[str, Tensor] = field(default_factory=dict)
    _graph: Graph | Callable[[], Graph] | None = None

    def __repr__(self) -> str:
        name, report = type(self.model).__name__, Report(self.report)
        head, foot = f"Pruned {name}: {report.said()}", "  .model .plan .report .scores .graph; .save(folder)"
        return fit([head, *(f"  {line}" for line in report.lines()[: HEIGHT - 2]), foot])

    @property
    def graph(self) -> Graph:
        """The groups of the dense model; traced on first use when the method needed none."""
        if callable(self._graph):
            self._graph = self._graph()
        if self._graph is None:
            raise SecateurError(
                "the model was pruned without example inputs", where="graph", fix="pass inputs="
            )
        return self._graph

    def save(self, directory: str | Path, *, packed: bool = False) -> None:
        """Weights, config, tokenizer, `plan.json` and `report.json` into a new directory, all or nothing.

        packed: zeros take a bit each (`secateur.io.packed`).

        Raises `SecateurError` when the directory isn't empty or the disk is full.
        """
        save_model(
            self.model,
            directory,
            tokenizer=self.tokenizer,
            plan=self.plan,
            report=self.report,
            dense_config=self.dense_config,
            packed=packed,
        )


def prune_with(
    model: nn.Module | Any,
    inputs: Inputs | None = None,
    *,
    method: str | Method,
    target: str | float | Target,
    data: Any = None,
    also: Sequence[Inputs] = (),
    seed: int = 0,
    tokenizer: Any = None,
    loss: Objective | None = None,
    inplace: bool = False,
    rollback: bool = True,
    resume: bool | str | Path = False,
    tasks: Iterable[str] = (),
    limit: int | None = None,
    progress: Callable[..., Iterable] | None = None,
    announce: Callable[[str], None] | None = None,
    prompts: Sequence[Any] | None = None,
    drawing: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Pruned:
    """Cut `model` down to `target` with `method`; `secateur.prune` is this, or chooses the method.

    >>> pruned = secateur.prune(model, method="wanda", target="50%", data=token_ids)  # doctest: +SKIP
    >>> pruned.report["after"]["params_nonzero"]  # doctest: +SKIP

    Parameters
    ----------
    model: a module, or a pipeline of diffusers, whose text encoders and denoisers are cut; `result.model.pipeline` draws with them.
    inputs: example inputs of `model.forward`: a tensor, a tuple or a dict. Language models need none.
    target: `50%` (share kept), `params<=100e6`, `macs<=50%`, `size<=200MB`, `latency<=8ms`, `2:4`; `vocabulary=16000` keeps
        so many tokens, `vocabulary=used` those that the text of `data` uses (`method` has no part in that).
    data: calibration data: token ids [samples, length], a list of model inputs, a text file, the name of a text, or
        None for English that every machine has. Vision models need a list of inputs where the method needs data.
    also: further example inputs that take other branches of the model: they are traced and proved, but not counted.
    loss: `loss(model, batch) -> scalar` for methods that need gradients of models that don't return their own loss.
    inplace: cut the model itself instead of a copy. A failed run leaves it as it was either way, unless `rollback` is
        False, which saves a copy of every changed tensor (for a model that is thrown away on failure).
    resume: keep finished steps on disk, so that a killed run goes on where it was: True for the cache, or a directory.
    tasks, limit: what to measure before and after (`wikitext2`, `piqa`, ...), with at most `limit` items each.
    progress, announce: `secateur.utils.progress.track` for bars; what is called with a line to tell, such as the memory that
        calibration will need.
    prompts, drawing: of a pipeline: what is drawn for calibration, and further arguments of its call (num_inference_steps,
        guidance_scale, ...).
    settings: fields of `Options` (samples, seqlen, schedule, allocation, floor, round_to, kinds, keep, only, share, uniform, repair,
        prove) and hyperparameters of the method.

    Raises `SecateurError`: unknown method or setting, a target that can't be met, no data, NaN weights, nothing to cut.
    """
    started = time.perf_counter()
    request = read_request("prune", method, target, settings)
    chosen, options, goal = request.method, request.options, request.target
    units = isinstance(chosen, UnitMethod)
    model = as_module(model, prompts, drawing)
    check_model(model)
    check_patterns(model, keep=options.keep, only=options.only, share=tuple(read_shares(options.share)))
    if inputs is None and (units or hasattr(getattr(model, "config", None), "vocab_size")):
        inputs = default_inputs(model, min(options.seqlen, TRACED))
    tokens = rank_tokens(model, tokenizer, data) if KIND in (options.kinds or ()) else None
    batches = None
    if options.fits or reads_data(chosen, options.divides):
        batches = calibration_batches(data, tokenizer, model, options.samples, options.seqlen, seed)

    measured: dict[str, Any] = {
        "inputs": inputs,
        "tokenizer": tokenizer,
        "tasks": tuple(tasks),
        "limit": limit,
        "seqlen": options.seqlen,
    }
    dense_config = copy.deepcopy(getattr(model, "config", None))
    working = model if inplace else copy.deepcopy(model)
    modes = [(module, module.training) for module in working.modules()]
    buffers = Buffers(working)
    working.eval()
    undo: Undo | None = None
    try:
        steady = units and options.prove
        counted: list[int] = []
        seen: list[list[Tensor]] = []
        if inputs is not None:
            around = counting(working, inputs, counted)
            seen = [check_forward(working, inputs, steady, again=buffers.changed, around=around)]
            seen += [check_forward(working, each, steady, again=buffers.changed) for each in also]
        before = measure(working, **measured, counted=counted)
        buffers.restore()
        undo = Undo(working, rollback and inplace)
        key = (
            chosen.name,
            chosen.source,
            chosen.hyperparameters,
            str(goal),
            dataclasses.asdict(options),
            seed,
        )
        checkpoint = Checkpoint(run_directory(resume, lambda: fingerprint(model, *key, batches)))
        context = Context(
            working,
            chosen,
            goal,
            inputs,
            data=batches,
            seed=seed,
            options=options,
            loss=loss,
            progress=progress,
            announce=announce,
            checkpoint=checkpoint,
            undo=undo,
            lean=inplace and not rollback,
            also=tuple(also),
            tokens=tokens,
        )
        if steady and inputs is not None:
            for each, first in zip((inputs, *also), seen):
                check_traced(working, context.graph, each, first)
        plan, graph = make_plan(context)
        parts = context.part_rows(plan)
        buffers.restore()
        if plan.structured:
            undo.release()
            apply_plan(working, plan, graph=graph)
        buffers = Buffers(working)
        if (kept := plan.tokens) is not None:
            tokenizer = measured["tokenizer"] = cut_tokenizer(plan, tokenizer)
            inputs = measured["inputs"] = (
                map_ids(inputs, lambda ids: ids % len(kept)) if inputs is not None else None
            )
        after = measure(working, **measured)
    except BaseException:
        if undo is not None:
            undo.restore()
        raise
    finally:
        buffers.restore()
        for module, mode in modes:
            module.training = mode
    checkpoint.remove()
    seconds = latency(working, inputs) if context.limit is not None and inputs is not None else None
    report = build_report(
        chosen,
        goal,
        plan,
        graph,
        before,
        after,
        options=dataclasses.asdict(options),
        kinds=options.kinds or getattr(chosen, "kinds", None),
        kept_share=context.met,
        refused=context.refused,
        skipped=context.skipped,
        latency=(context.limit, seconds),
        parts=parts,
    )
    if graph is not None and (endangered := graph.endangered(plan.keep)):
        report["unreached"], report["met"] = endangered, False
    report["seconds"] = time.perf_counter() - started
    return Pruned(
        model=working,
        plan=plan,
        report=report,
        tokenizer=tokenizer,
        dense_config=dense_config,
        scores=context.scores,
        _graph=graph or (lambda: trace(model, inputs, also=also)) if inputs is not None else graph,
    )


def cut_tokenizer(plan: Plan, tokenizer: Any) -> Any:
    """The tokenizer of a model whose vocabulary a plan cuts; the same where it doesn't, or there is none.

    >>> tokenizer = cut_tokenizer(plan, tokenizer)  # doctest: +SKIP
    """
    kept = plan.tokens
    return tokenizer if kept is None or tokenizer is None else trim_tokenizer(tokenizer, kept.tolist())


def make_plan(context: Context) -> tuple[Plan, Graph | None]:
    """(the plan, the groups it was made along where the method removes units), in the rounds of the schedule."""
    method, target = context.method, context.target
    count = parse_schedule(context.options.schedule)
    targets = [target]
    if count > 1:
        targets = [dataclasses.replace(target, value=share) for share in rounds(target.value, count)]
    if isinstance(method, UnitMethod):
        return plan_units(method, context, targets)
    assert isinstance(method, WeightMethod)
    if target.kind == "share" and target.value == 1 and not context.options.share:
        return context.make_plan(), None
    # each round prunes what the one before left in the model
    for index, goal in enumerate(targets):
        plan = plan_weights(method, dataclasses.replace(context, target=goal, round=index))
    plan.target = str(target)
    return plan, None


def apply_plan(
    model: nn.Module,
    plan: Plan,
    inputs: Inputs | None = None,
    graph: Graph | None = None,
    also: Sequence[Inputs] | None = None,
) -> None:
    """Do what a plan says, in place: repaired tensors, zeros, and cut units.

    `inputs` and `also` are those of `prune_with`; without them noise of their shapes is traced.

    >>> secateur.apply_plan(fresh_model, secateur.Plan.load("pruned/"))  # doctest: +SKIP

    Raises `SecateurError` when the plan is another model's; the model is then untouched.
    """
    fix = "apply it to the model it was made for"
    check_tensors(model, plan.values, "value", where="plan", fix=fix, new=True)
    parameters = check_tensors(model, plan.masks, "mask", where="plan", fix=fix)
    if plan.keep:
        if graph is None:
            device = device_of(model)
            stored = from_description({"inputs": plan.inputs, "also": plan.options.get("also", [])})
            stored = map_tensors(stored, lambda tensor: tensor.to(device))
            inputs = stored["inputs"] if inputs is None else inputs
            also = stored["also"] if also is None else also
            tokens = plan.tokens is not None
            graph = trace(model, inputs, also=also, vocabulary=tokens)
            if "head_dim" in plan.kinds.values() and plan.keep.keys() - {g.name for g in graph.groups}:
                graph = trace(model, inputs, also=also, inner=True, vocabulary=tokens)
            if "attentions" in plan.kinds.values():
                graph.groups += attention_groups(model, graph, inputs)
            if "novices" in plan.kinds.values():
                graph.groups += novice_groups(model, graph)
            if also and graph.unreached:  # noise may take another branch than what was traced
                raise SecateurError(
                    f"these inputs don't reach {graph.unreached[0]}",
                    where="plan",
                    fix="pass inputs= and also=, those that the plan was made with",
                )
        for name in plan.keep:
            group = next((g for g in graph.groups if g.name == name), None)
            if group is None or group.size != plan.sizes[name]:
                size = "no such group" if group is None else f"{group.size} units"
                raise SecateurError(
                    f"the plan cuts {name} of {plan.sizes[name]} units, the model has {size}",
                    where="plan",
                    fix=fix,
                )
            if group.reason:
                raise SecateurError(f"{name} can't be cut: {group.reason}", where="plan")
    set_values(model, plan.values)
    with torch.no_grad():
        for name, mask in plan.masks.items():
            parameters[name].masked_fill_(~mask.to(parameters[name].device), 0)
    if plan.keep:
        assert graph is not None
        cut_units(model, graph, plan.keep)
