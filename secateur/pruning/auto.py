"""Without a method named: which one fits the model, the target, the hardware and the data, tried on held-out data if asked.

The order of the candidates is what `benchmarks/auto.py` measured, and where the library ships a comparison on such a model, its
figures are part of the reason. What was tried, what it came to and why one was chosen stand in the report.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from secateur.data import calibration_batches
from secateur.errors import SecateurError, choose, require
from secateur.families.pipelines import as_module
from secateur.graph import trace
from secateur.graph.blocks import every_matrix
from secateur.method import Method
from secateur.pruning.options import Options
from secateur.pruning.prune import TRACED, Pruned, prune_with
from secateur.pruning.request import OF_UNITS, OPTIONS
from secateur.pruning.target import Target, parse_target
from secateur.pruning.tokens import KIND
from secateur.pruning.vocabulary import TokenFrequency
from secateur.stats.collect import default_loss
from secateur.taxonomy.axes import HARDWARE
from secateur.taxonomy.measured import fitting, shipped, standings
from secateur.utils.batches import as_batches, labels_in, sequences_in
from secateur.utils.inputs import Inputs, default_inputs, map_tensors
from secateur.utils.running import device_of, evaluating, flat_tensors, run
from secateur.utils.types import Objective

AUTO = "auto"
EFFORTS = (1, 2, 3)
HELD = 4
"""Of so many calibration samples one is held out, where candidates are tried."""


@dataclass(frozen=True)
class Candidate:
    """A method with its settings, and why it is one."""

    method: str
    why: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def said(self) -> str:
        return " ".join([self.method, *(f"{name}={_text(value)}" for name, value in self.settings.items())])


def _text(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple | list) else str(value)


FITTED = {"repair": "reconstruct"}
WEIGHTS = (
    Candidate("sparsegpt", "each weight makes up for those before it, then each block is fitted to the dense model's", FITTED),
    Candidate("wanda", "weights by what arrives at them, then each block is fitted to the dense model's", FITTED),
    Candidate("ria", "weights by their share of row and column, then each block is fitted to the dense model's", FITTED),
)  # fmt: skip
CLOSED = {"repair": "obs"}
SPARED = Candidate(
    "2ssp",
    "neurons by what they give, from each layer as many as its predictions can spare, then what reads them is solved anew",
    {"attentions": 0, "allocation": "measured", **CLOSED},
)
GENTLE = Candidate(  # first where more than half of the neurons would have to leave
    "nirvana",
    "neurons and attention groups by what the model's output loses, attention more gently, then what reads them is solved anew",
    CLOSED,
)
GENTLE_KINDS = {"heads", "kv_groups"}
"""What it cuts beside neurons: where these stay whole, it has no advantage."""
UNITS = {
    "llm": (
        SPARED,
        GENTLE,
        Candidate(
            "2ssp",
            "neurons by what they give, then attentions by what the text loses without them, then what reads them is solved anew",
            CLOSED,
        ),
        Candidate("flap", "units by how much they vary, with a bias for what left"),
    ),
    "other": (
        Candidate("obspa", "units by what their loss costs after the layers that read them are solved anew"),
        Candidate("taylor", "units by what the loss says of them"),
        Candidate("group-magnitude", "units by their weights"),
    ),
}
WITHOUT_DATA = {
    True: (Candidate("group-magnitude", "units by their weights: there are no data"),),
    False: (Candidate("magnitude", "weights by their size: there are no data"),),
}
ALLOCATIONS = ("global", "uniform", "per-kind")


def prune(
    model: nn.Module | Any,
    inputs: Inputs | None = None,
    *,
    method: str | Method = AUTO,
    target: str | float | Target,
    effort: int = 1,
    hardware: str | None = None,
    data: Any = None,
    seed: int = 0,
    tokenizer: Any = None,
    loss: Objective | None = None,
    inplace: bool = False,
    **settings: Any,
) -> Pruned:
    """Cut `model` down to `target`: with `method`, or with the one that fits best.

    >>> pruned = secateur.prune(model, target="macs<=70%", tokenizer=tokenizer)  # doctest: +SKIP
    >>> pruned.report["auto"]["why"]  # doctest: +SKIP
    >>> pruned = secateur.prune(model, method="wanda", target="50%", data=token_ids)  # doctest: +SKIP

    Parameters
    ----------
    method: a name or a method; "auto" chooses one. effort and hardware are auto's.
    effort: 1: the candidate that stands first; 2: the two first ones are tried, and judged on held-out data; 3: three, and then
        the ways to divide the budget of the best.
    hardware: what the result runs on: gpu-dense or cpu (units leave, so that it is faster everywhere), sparse or storage (single
        weights), gpu-2:4. None: where the model is. A target such as 2:4 means single weights anyway.
    data: as for a named method; where candidates are tried, a fourth of the samples is held out and only judges. Language models
        are judged by their loss on it, others by the loss of labelled pairs, else by how far outputs are from the dense model's.
    inplace: with effort 1 alone, since what is tried is tried on copies.
    settings: everything that `secateur.pruning.prune.prune_with` takes; with "auto" no hyperparameters, since they are a method's.

    The report's `auto` holds effort, hardware, `tried` (method, settings, loss, seconds, error) and `why`.

    Raises `SecateurError`: as a named method does; with "auto" also where no candidate fits, with the reason of each.
    """
    goal, kinds = parse_target(target), set(settings.get("kinds") or ())
    if method == AUTO and (goal.kind == KIND or kinds == {KIND}):  # no method scores tokens
        method = TokenFrequency()
    common: dict[str, Any] = {"target": target, "seed": seed, "tokenizer": tokenizer, "loss": loss}
    common |= {name: value for name, value in settings.items() if value is not None}
    if method != AUTO:
        unused = effort == 1 and hardware is None
        fix = "leave out method"
        require(unused, "they choose a method, and it is named", where="effort and hardware", fix=fix)
        return prune_with(model, inputs, method=method, data=data, inplace=inplace, **common)
    choose(effort, EFFORTS, what="effort", where="effort")
    require(effort == 1 or not inplace, "trials run on copies", where="inplace", fix="effort=1")
    require(
        effort == 1 or KIND not in kinds,
        "trials are judged on ids of one vocabulary",
        where="effort",
        fix="effort=1",
    )
    own = [name for name in settings if name not in OPTIONS and name not in OF_PRUNE]
    require(not own, f"{', '.join(own)} belongs to a method", where="method=auto", fix="name the method too")
    module = as_module(model, settings.get("prompts"), settings.get("drawing"))
    place = hardware or ("cpu" if device_of(module).type == "cpu" else "gpu-dense")
    choose(place, HARDWARE, what="hardware", where="hardware")
    batches, held = _split(data, tokenizer, module, settings, seed, effort > 1)
    found = candidates(module, goal, place, batches is not None, settings, inputs)
    common |= {"data": batches, "inplace": inplace, "rollback": True}
    tried: list[dict[str, Any]] = []
    judge = judge_of(module, held, loss) if effort > 1 else None
    best: Pruned | None = None

    def attempt(candidate: Candidate) -> None:
        nonlocal best
        start, line = time.perf_counter(), {"method": candidate.method, "settings": dict(candidate.settings)}
        try:
            pruned = prune_with(model, inputs, method=candidate.method, **{**candidate.settings, **common})
        except SecateurError as error:
            tried.append({**line, "error": str(error)})
            return
        value = judge(pruned.model) if judge else None
        met, seconds = pruned.report["met"], time.perf_counter() - start
        tried.append({**line, "said": candidate.said, "loss": value, "met": met, "seconds": seconds})
        if best is None or (judge and _better(tried[-1], best.report["auto"])):
            best, pruned.report["auto"] = pruned, {**tried[-1], "why": candidate.why}

    for candidate in found:
        if sum("error" not in line for line in tried) < effort:
            attempt(candidate)
    if best is None:
        reasons = "; ".join(f"{line['method']}: {line['error']}" for line in tried)
        raise SecateurError(f"no candidate fits ({reasons})", where="method=auto", fix="name a method")
    if effort == max(EFFORTS) and best.plan.structured and not common.get("allocation"):
        chosen = best.report["auto"]
        for allocation in ALLOCATIONS:
            attempt(
                Candidate(chosen["method"], chosen["why"], {**chosen["settings"], "allocation": allocation})
            )
    return _told(best, tried, effort, place, module)


OF_PRUNE = ("also", "rollback", "resume", "tasks", "limit", "progress", "announce", "prompts", "drawing")


def candidates(
    model: nn.Module,
    target: Target,
    hardware: str,
    has_data: bool,
    settings: Mapping[str, Any],
    inputs: Inputs | None = None,
) -> list[Candidate]:
    """The methods that may fit, best first; a setting of the caller's stands in place of a candidate's."""
    units = target.n_m is None and (
        target.kind in OF_UNITS or not HARDWARE[hardware] & {"unstr"} or bool(settings.get("kinds"))
    )
    kind = _kind(model)
    found = (UNITS[kind] if units else WEIGHTS) if has_data else WITHOUT_DATA[units]
    asked = set(settings.get("kinds") or GENTLE_KINDS)
    if GENTLE in found and asked & GENTLE_KINDS and not half_of_the_neurons(model, target, inputs):
        found = (GENTLE, *(candidate for candidate in found if candidate is not GENTLE))
    given = {name for name, value in settings.items() if value is not None}
    return [
        dataclasses.replace(c, settings={n: v for n, v in c.settings.items() if n not in given})
        for c in found
    ]


def half_of_the_neurons(model: nn.Module, target: Target, inputs: Inputs | None = None) -> bool:
    """Whether the target holds once half of all neurons have left. True for a target that a trace can't tell, such as latency.

    >>> half_of_the_neurons(model, parse_target("macs<=80%"))  # doctest: +SKIP
    True
    """
    if target.kind not in ("share", "macs", "params", "size"):
        return True
    graph = trace(model, default_inputs(model, TRACED) if inputs is None else inputs)
    half = {
        group.name: torch.arange(group.size // 2) for group in graph.prunable("neurons") if group.size > 1
    }
    if target.kind == "macs":
        left, dense = graph.macs(half), graph.macs()
    else:
        names = list(every_matrix(model)) if target.kind == "share" else None
        left, dense = graph.params(half, names=names), graph.params(names=names)
    each = next(model.parameters()).element_size() if target.kind == "size" else 1
    return left * each <= target.limit(dense * each)


def _kind(model: nn.Module) -> str:
    generates = getattr(model, "can_generate", lambda: False)()
    return "llm" if generates and getattr(getattr(model, "config", None), "vocab_size", None) else "other"


def _split(
    data: Any, tokenizer: Any, model: nn.Module, settings: Mapping[str, Any], seed: int, hold: bool
) -> tuple[Any, Any]:
    """(what is calibrated on, what judges); None for both where there are no data and none are asked for."""
    options = Options()
    samples, seqlen = (settings.get(name) or getattr(options, name) for name in ("samples", "seqlen"))
    more = max(1, samples // HELD) if hold else 0
    language = getattr(getattr(model, "config", None), "vocab_size", None) is not None
    if data is None and not language and not hasattr(model, "calibration_inputs"):
        require(not hold, "there are no data to judge on", where="effort", fix="give data, or effort=1")
        return None, None
    batches = calibration_batches(data, tokenizer, model, samples + more, seqlen, seed)
    if not hold:
        return batches, None
    if isinstance(batches, list) and len(batches) == 1 and sequences_in(batches[0]) > 1:
        size = sequences_in(batches[0])
        cut = size - max(1, size // HELD)
        calibrated, judging = (_rows(batches[0], rows) for rows in (slice(cut), slice(cut, None)))
        return [calibrated], [judging]
    count = len(batches)
    require(
        count > 1, "one sample can't calibrate and judge", where="effort", fix="give more data, or effort=1"
    )
    cut = count - max(1, min(more, count // HELD))
    return batches[:cut], batches[cut:]


def _rows(batch: Inputs, rows: slice) -> Inputs:
    return map_tensors(batch, lambda tensor: tensor[rows])


def judge_of(dense: nn.Module, held: Any, loss: Objective | None = None) -> Callable[[nn.Module], float]:
    """How bad a model is on held-out batches: the mean of its loss, or where there is none the relative squared distance of its
    outputs from the dense model's."""
    batches = as_batches(held)
    try:
        own = loss or default_loss(dense, batches[0])
    except SecateurError:
        return _distance(dense, batches)

    @torch.no_grad()
    def judge(model: nn.Module) -> float:
        device, total, count = device_of(model), 0.0, 0
        with evaluating(model):
            for batch in batches:
                size = sequences_in(batch[0] if labels_in(model, batch) is not None else batch)
                total += size * float(own(model, map_tensors(batch, lambda t: t.to(device))))
                count += size
        return total / count

    return judge


@torch.no_grad()
def _distance(dense: nn.Module, batches: Sequence[Inputs]) -> Callable[[nn.Module], float]:
    def outputs(model: nn.Module) -> list[Tensor]:
        with evaluating(model), torch.no_grad():
            return [
                t.float().cpu() for b in batches for t in flat_tensors(run(model, b)) if t.is_floating_point()
            ]

    wanted = outputs(dense)
    scale = sum(float(t.square().sum()) for t in wanted)

    def judge(model: nn.Module) -> float:
        return sum(float((a - b).square().sum()) for a, b in zip(outputs(model), wanted, strict=True)) / scale

    return judge


def _better(line: Mapping[str, Any], best: Mapping[str, Any]) -> bool:
    """A target that is met comes before one that isn't; then the lower loss. What isn't a number is worst."""
    keys = [(not one["met"], math.inf if math.isnan(one["loss"]) else one["loss"]) for one in (line, best)]
    return keys[0] < keys[1]


def _told(
    pruned: Pruned, tried: Sequence[Mapping[str, Any]], effort: int, hardware: str, model: nn.Module
) -> Pruned:
    chosen = pruned.report["auto"]
    figures = standings(
        fitting(
            shipped(), {"llm"} if _kind(model) == "llm" else {"cnn", "vit"}, pruned.plan.structured, False
        )
    )
    measured = figures.get(chosen["method"])
    why = [f"{chosen['said']} was chosen: {chosen['why']}"]
    if effort > 1:
        losses = ", ".join(f"{line['said']} {line['loss']:.4g}" for line in tried if "error" not in line)
        why.append(f"the lowest loss on held-out data of those that were tried: {losses}")
    elif measured is not None:
        why.append(f"measured before: {measured.text}")
    why += [f"{line['method']} doesn't fit: {line['error']}" for line in tried if "error" in line]
    about = {"effort": effort, "hardware": hardware, "tried": list(tried), "why": "; ".join(why)}
    pruned.report["auto"] = about
    pruned.report["notes"] = [f"auto: {about['why']}", *pruned.report["notes"]]
    return pruned
