"""Tasks, language models and scenes as one kind of work: what fits it, its dense model, and one run of a method."""

from __future__ import annotations

import copy
import functools
import math
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from secateur.comparison.details import gradient_map, histogram, kept_tokens, layers
from secateur.comparison.rows import DENSE, Run
from secateur.comparison.setup import Setup
from secateur.data.text import load_calibration
from secateur.errors import SecateurError, choose
from secateur.graph import trace
from secateur.measure import macs, measure, params, params_nonzero
from secateur.measure.timing import FORWARD, latencies
from secateur.method import Method, method_class
from secateur.pruning.prune import Pruned, prune
from secateur.tasks import load_model, load_task, models, registry
from secateur.tasks.scenes import evaluate as scenes
from secateur.tasks.scenes.models import DEPTH, TOKENS, load_scenes, scenes_tokenizer
from secateur.tokens.state import Missing
from secateur.training import fit
from secateur.training.batches import length, take
from secateur.training.masks import Masked
from secateur.training.train_prune import train_prune
from secateur.utils.about import library_versions

Figures = dict[str, Any]
BATCH, SEQLEN = 32, 128
"""Samples of a calibration batch; tokens of a calibration window of language models."""
CLOSE = 0.02
"""How far from the share of tokens x layers that was asked for a token method may end, as it keeps whole tokens."""


class Work:
    """What methods are compared on."""

    verbs: tuple[str, ...]
    costs: tuple[str, ...]
    """The first is what budgets are counted in unless said."""
    metric: str
    sign: int = 1
    """-1 where less is better."""

    def __init__(self, setup: Setup):
        self.setup = setup

    def dense(self, seed: int) -> Figures:
        """The figures of the model as it is."""
        raise NotImplementedError

    def run(self, run: Run) -> Figures:
        """The figures of one run. Raises `SecateurError` where the method or the target doesn't fit."""
        raise NotImplementedError


class TaskWork(Work):
    """A trained network of a task: cut, and trained on for as long as methods that train may."""

    verbs = ("prune", "train_prune")
    costs = ("params", "macs")

    def __init__(self, setup: Setup):
        super().__init__(setup)
        self.task = load_task(setup.task, train=setup.train, test=setup.test)
        self.metric, self.sign = self.task.metric, self.task.sign
        if self.task.pretrained is None or self.task.quality is None:
            raise SecateurError(
                "it has no trained network to compare on", where=f"task {setup.task}", fix="take another task"
            )

    @functools.cached_property
    def network(self) -> nn.Module:
        assert self.task.pretrained is not None
        return self.task.pretrained().eval()

    @functools.cached_property
    def kinds(self) -> tuple[str, ...] | None:
        """Kinds of unit for chance to draw from: its own, or channels where the network has none of these."""
        own = method_class("random-structured").kinds  # type: ignore[attr-defined]
        graph = trace(self.network, self.task.inputs)
        return None if any(graph.prunable(kind) for kind in own) else ("channels",)

    def dense(self, seed: int) -> Figures:
        return self._figures(self.network) | {"map": gradient_map(self.network, self.task.train)}

    def run(self, run: Run) -> Figures:
        kind = method_class(run.method)
        check_fit(self, kind, run.method, self.setup)
        target = self.setup.budget(run.target)
        if kind.verb == "train_prune":
            done = train_prune(
                self.task, method=run.method, target=target, steps=self.setup.steps, seed=run.seed
            )
        else:
            done = prune(
                copy.deepcopy(self.network),
                self.task.inputs,
                method=run.method,
                target=target,
                data=calibration(self.task.train, self.network, self.setup.samples, run.seed),
                loss=self.task.loss,
                seed=run.seed,
                inplace=True,
                rollback=False,
                **self._options(kind),
            )
            if self.setup.steps:
                self._tune(done, run.seed)
        found = self._figures(done.model, done) | told(done)
        return found | {"map": gradient_map(done.model, self.task.train)}

    def _options(self, kind: type[Method]) -> dict[str, Any]:
        """Options of `prune` that follow from the data, and the kinds of unit that chance draws from."""
        text = {"seqlen": SEQLEN} if isinstance(self.task.train, Tensor) else {}
        return text | ({"kinds": self.kinds} if by_chance(kind) and removes_units(kind) else {})

    def _tune(self, done: Pruned, seed: int) -> None:
        masks = {name: mask for name, mask in done.plan.masks.items()}
        fit(
            done.model,
            self.task.train,
            steps=self.setup.steps,
            seed=seed,
            loss=self.task.loss,
            augment=self.task.augment,
            recipe=self.task.recipe,
            after_step=[Masked(done.model, masks)] if masks else [],
        )
        done.model.eval()

    def _figures(self, model: nn.Module, done: Pruned | None = None) -> Figures:
        assert self.task.quality is not None
        return {"quality": float(self.task.quality(model))} | cost(
            model, self.network, self.task.inputs, self.setup, done
        )


class LanguageWork(Work):
    """A language model: perplexity of WikiText-2 after a cut that is calibrated on the Brown corpus."""

    verbs = ("prune",)
    costs = ("params", "macs")
    metric, sign = "perplexity", -1
    judged, read = "wikitext2", "brown"

    def __init__(self, setup: Setup):
        super().__init__(setup)
        self.model, self.tokenizer = load_model(setup.task)

    def dense(self, seed: int) -> Figures:
        return self._figures(self.model)

    def run(self, run: Run) -> Figures:
        check_fit(self, method_class(run.method), run.method, self.setup)
        done = prune(
            copy.deepcopy(self.model),
            method=run.method,
            target=self.setup.budget(run.target),
            data=load_calibration(
                self.model, self.tokenizer, self.read, self.setup.samples, SEQLEN, run.seed
            ),
            tokenizer=self.tokenizer,
            seed=run.seed,
            seqlen=SEQLEN,
            inplace=True,
            rollback=False,
        )
        return self._figures(done.model, done) | told(done)

    def _figures(self, model: nn.Module, done: Pruned | None = None) -> Figures:
        found = measure(model, self.tokenizer, [self.judged], limit=self.setup.test or 16, seqlen=2 * SEQLEN)
        value = found["perplexity"][self.judged]
        if value is None:
            raise SecateurError("its perplexity isn't finite", where=self.judged, fix="a milder target")
        inputs = {"input_ids": torch.zeros(1, 2 * SEQLEN, dtype=torch.int64)}
        return {"quality": float(value)} | cost(model, self.model, inputs, self.setup, done)


class ScenesWork(Work):
    """Questions about drawn scenes: visual tokens leave while a small vision-language model answers; one model a seed."""

    verbs = ("attach",)
    costs = ("tokens",)
    metric, sign = "accuracy", 1
    own: Mapping[str, Mapping[str, Any]] = {
        name: {"text": "embeddings"} for name in ("recoverable-compression", "cdpruner")
    }
    """Settings that a bench must give: there is no contrastive text tower, so likeness is taken in word embeddings."""

    def __init__(self, setup: Setup):
        super().__init__(setup)
        self.variant = setup.task.partition(":")[2] or "llava"
        self.limit = setup.test or 128

    def dense(self, seed: int) -> Figures:
        return self._figures(scenes.evaluate(None, None, self.variant, [seed], self.limit))

    def run(self, run: Run) -> Figures:
        check_fit(self, method_class(run.method), run.method, self.setup)
        wanted = float(run.target.rstrip("%")) / 100
        target = self._target(run.method, wanted, run.seed)
        found = self._figures(self._score(run, target, self.limit))
        if abs(found["tokens"] - wanted) > CLOSE:
            raise SecateurError(
                f"it can't come nearer to {wanted:.0%} of the tokens x layers than {found['tokens']:.1%}",
                where=run.method,
                fix="another budget",
            )
        shown = kept_tokens(
            load_scenes(self.variant, run.seed),
            run.method,
            target=target,
            seed=run.seed,
            **self._extra(run.method),
        )
        return found | {"target_given": target, "kept": shown}

    def _target(self, method: str, wanted: float, seed: int) -> str:
        """The target at which the method has this share of tokens x layers, by bisection on a few pictures."""
        low, high = 0.0, 1.0
        best = (2.0, "100%")
        for _ in range(9):
            middle = (low + high) / 2
            target = f"{middle * 100:.4g}%"
            try:
                share = self._figures(self._score(Run(method, target, seed), target, 16))["tokens"]
            except SecateurError:  # too few tokens for the method's stages: it needs more
                share = 0.0
            best = min(best, (abs(share - wanted), target))
            if best[0] < CLOSE / 8:
                break
            low, high = (middle, high) if share < wanted else (low, middle)
        return best[1]

    def _score(self, run: Run, target: str, limit: int) -> scenes.Score:
        where = (self.variant, [run.seed], limit)
        score = scenes.evaluate(run.method, target, *where, **self._extra(run.method))
        if score.missing:
            raise SecateurError(score.missing, where=run.method, fix="compare the others")
        return score

    def _extra(self, method: str) -> Figures:
        return {"tokenizer": scenes_tokenizer(), **self.own.get(method, {})}

    def _figures(self, score: scenes.Score) -> Figures:
        return {
            "quality": score.mean[0] / 100,
            "parts": {kind: values[0] / 100 for kind, values in score.accuracy.items()},
            "tokens": score.tokens_layers / (TOKENS * DEPTH),
            "seconds_judging": score.seconds,
        }


def work_of(setup: Setup) -> Work:
    """The work of this name: a task (`digits`, `cifar10:resnet20`, ...), `scenes`, or a language model.

    Raises `SecateurError` for a name nobody knows, with the nearest, and for a cost that it has none of.
    """
    kind = kind_of(setup.task)
    choose(setup.cost, kind.costs, error=f"{setup.task} has no cost {setup.cost!r}", where="cost")
    return kind(setup)


def kind_of(task: str) -> type[TaskWork | LanguageWork | ScenesWork]:
    """The kind of work that a name means."""
    first = task.partition(":")[0]
    if first == "scenes":
        return ScenesWork
    if first in registry.NETWORKS or task in registry.OWNERS:
        return TaskWork
    if "/" in task or task.startswith("."):
        return LanguageWork
    names = ("scenes", *registry.TASKS, *registry.OWNERS, *models.NAMES)
    choose(task, tuple(dict.fromkeys(names)), error=f"there is no task {task!r}", where="task", near=3)
    return LanguageWork


def check_fit(work: Work | type[Work], kind: type[Method], name: str, setup: Setup) -> None:
    """Raises `SecateurError` where a method can't be compared on this work at these budgets."""
    what = {
        "prune": "prunes without training",
        "train_prune": "prunes while it trains",
        "attach": "drops tokens while a model runs",
        "saliency": "draws maps and removes nothing",
    }
    if kind.verb not in work.verbs:
        raise SecateurError(
            f"it {what.get(kind.verb, 'does something else')}",
            where=f"{name} on {setup.task}",
            fix="compare it where that is done",
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
    from secateur.pruning.method import UnitMethod

    return issubclass(kind, UnitMethod) or getattr(kind, "removes", None) == "units"


def calibration(train: Any, network: nn.Module, samples: int, seed: int) -> Any:
    """`samples` of a task's training data as what `prune` calibrates on: batches, rows of token ids, or what the network draws."""
    if hasattr(network, "calibration_inputs"):
        return None
    count = length(train)
    generator = torch.Generator().manual_seed(seed)
    if isinstance(train, list):
        return take(train, torch.randperm(count, generator=generator)[: max(1, samples // BATCH)])
    rows = torch.randperm(count, generator=generator)[:samples]
    return (
        take(train, rows) if isinstance(train, Tensor) else [take(train, part) for part in rows.split(BATCH)]
    )


def cost(
    model: nn.Module, dense: nn.Module, inputs: Any, setup: Setup, done: Pruned | None = None
) -> Figures:
    """Shares of the dense model's parameters (those that aren't zero) and multiply-adds, bytes of memory, and the speed."""
    found: Figures = {
        "params": params_nonzero(model) / params(dense),
        "macs": macs(model, inputs) / macs(dense, inputs),
    }
    if setup.latency and done is not None:
        rows, speed, why = latencies([dense, model], inputs)
        found |= {
            "forward_seconds": rows[1].get(FORWARD),
            "quartiles": rows[1].get("quartiles", {}).get(FORWARD),
        }
        found |= {"speed": speed.get(FORWARD), "untimed": why.get(FORWARD)}
    if done is not None:
        after = done.report["after"]
        found["peak_memory_bytes"] = after.get("peak_memory_bytes")
    return found


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
        figures = work.dense(run.seed) if run.method == DENSE else work.run(run)
        if not math.isfinite(figures["quality"]):
            raise SecateurError(f"the {work.metric} isn't finite", where=run.method, fix="a milder target")
        row |= {"state": "done", "metric": work.metric, "sign": work.sign} | figures
    except (SecateurError, Missing) as error:
        row |= {"state": "refused", "why": " ".join(str(error).split())}
    except Exception as error:  # noqa: BLE001  one broken run must not end the comparison: it is a row with its error
        row |= {"state": "failed", "why": " ".join(f"{type(error).__name__}: {error}".split())}
    row["versions"] = library_versions()
    row["wall_seconds"], row["cpu_seconds"] = time.perf_counter() - started, time.process_time() - cpu
    return row
