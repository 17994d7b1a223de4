"""What methods are compared on: what fits it, and what a row says of any of it."""

from __future__ import annotations

import abc
import math
import time
from typing import Any

from torch import nn

from secateur.comparison.details import histogram, layers
from secateur.comparison.limit import OutOfTime, stopped_after
from secateur.comparison.rows import DENSE, Run
from secateur.comparison.setup import Setup
from secateur.errors import SecateurError
from secateur.measure import macs, params, params_nonzero
from secateur.measure.timing import FORWARD, latencies
from secateur.method import Method
from secateur.pruning.method import UnitMethod
from secateur.pruning.prune import Pruned
from secateur.utils.about import library_versions

Figures = dict[str, Any]
SEQLEN = 128
"""Tokens of a calibration window of language models."""


class Work(abc.ABC):
    """What methods are compared on."""

    verbs: tuple[str, ...]
    costs: tuple[str, ...]
    """The first is what budgets are counted in unless said."""
    metric: str
    sign: int = 1
    """-1 where less is better."""
    usual: int | None = None
    """On how much is judged unless said; None: all there is."""

    def __init__(self, setup: Setup):
        self.setup = setup

    @classmethod
    def check_geometry(cls, setup: Setup) -> None:
        """Raises `SecateurError` where the last features of what is compared don't lie to classes of pictures."""
        raise SecateurError(
            "it is no classifier of pictures, so its features have no geometry to gather",
            where=f"--geometry on {setup.task}",
            fix="leave it out, or compare on digits, cifar10 or imagenet-sample",
        )

    @abc.abstractmethod
    def dense(self, seed: int) -> Figures:
        """The figures of the model as it is."""

    @abc.abstractmethod
    def run(self, run: Run) -> Figures:
        """The figures of one run. Raises `SecateurError` where the method or the target doesn't fit."""


def check_fit(work: Work | type[Work], kind: type[Method], name: str, setup: Setup) -> None:
    """Raises `SecateurError` where a method can't be compared on this work at these budgets."""
    what = {
        "prune": "prunes without training",
        "train_prune": "prunes while it trains",
        "attach": "drops tokens while a model runs",
        "saliency": "draws maps and removes nothing",
        "train_objects": "learns which objects stand out and removes nothing",
    }
    if kind.verb not in work.verbs:
        raise SecateurError(
            f"it {what.get(kind.verb, 'does something else')}",
            where=f"{name} on {setup.task}",
            fix="compare it where that is done",
        )
    if getattr(kind, "removes", "") == "work":
        raise SecateurError(
            "it removes no weights: what it skips depends on the picture",
            where=f"{name} on {setup.task}",
            fix="its figures are in docs/results.md",
        )
    if kind.verb == "train_prune" and not setup.steps:
        raise SecateurError("it trains, and no steps were given", where=name, fix="--steps")
    if setup.cost == "macs" and not removes_units(kind):
        raise SecateurError(
            "it sets single weights to zero, which saves no multiply-adds of a dense layer",
            where=name,
            fix="compare it by --cost params",
        )


def baseline_of(setup: Setup) -> str:
    """What others are tested against beside chance, unless said."""
    return (
        "fastervlm" if setup.cost == "tokens" else "group-magnitude" if setup.cost == "macs" else "magnitude"
    )


def by_chance(kind: type[Method]) -> bool:
    """Whether a method decides by chance."""
    return set(kind.info.criteria) == {"none"}


def removes_units(kind: type[Method]) -> bool:
    """Whether what is left is smaller, not only sparse."""
    return issubclass(kind, UnitMethod) or getattr(kind, "removes", None) == "units"


def cost(
    model: nn.Module, dense: nn.Module, inputs: Any, setup: Setup, done: Pruned | None = None
) -> Figures:
    """Shares of the dense model's parameters (those that aren't zero) and multiply-adds, bytes of memory, and the speed."""
    found: Figures = {
        "params": params_nonzero(model) / params(dense),
        "macs": macs(model, inputs) / macs(dense, inputs),
    }
    if setup.latency and done is not None:
        found |= timings(dense, model, inputs)
    if done is not None:
        after = done.report["after"]
        found["peak_memory_bytes"] = after.get("peak_memory_bytes")
    return found


def timings(dense: nn.Module, model: nn.Module, inputs: Any) -> Figures:
    """Seconds of a forward with quartiles, and how many times as fast as the dense model it is, in turn with it."""
    rows, speed, why = latencies([dense, model], inputs)
    return {
        "forward_seconds": rows[1].get(FORWARD),
        "quartiles": rows[1].get("quartiles", {}).get(FORWARD),
        "speed": speed.get(FORWARD),
        "untimed": why.get(FORWARD),
    }


def told(done: Pruned) -> Figures:
    """What a run says of itself: whether its target is met, how long it took, and what each layer keeps."""
    return {
        "met": done.report.get("met"),
        "seconds": done.report["seconds"],
        "layers": layers(done.plan),
        "scores": histogram(done),
        "notes": dict(done.plan.notes),
    }


def timed(work: Work, run: Run) -> Figures:
    """The row of a run, whatever comes of it."""
    started, cpu = time.perf_counter(), time.process_time()
    row: Figures = {"method": run.method, "target": run.target, "seed": run.seed}
    try:
        with stopped_after(work.setup.minutes):
            figures = work.dense(run.seed) if run.method == DENSE else work.run(run)
        if not math.isfinite(figures["quality"]):
            raise SecateurError(f"the {work.metric} isn't finite", where=run.method, fix="a milder target")
        row |= {"state": "done", "metric": work.metric, "sign": work.sign} | figures
    except SecateurError as error:
        row |= {"state": "refused", "why": " ".join(str(error).split())}
    except OutOfTime as error:
        row |= {"state": "refused", "why": str(error)}
    except Exception as error:  # noqa: BLE001  one broken run must not end the comparison: it is a row with its error
        row |= {"state": "failed", "why": " ".join(f"{type(error).__name__}: {error}".split())}
    row["versions"] = library_versions()
    row["wall_seconds"], row["cpu_seconds"] = time.perf_counter() - started, time.process_time() - cpu
    return row
