"""Questions about drawn scenes, for methods that drop visual tokens."""

from __future__ import annotations

from torch import Tensor, nn

from secateur.comparison.details import kept_tokens
from secateur.comparison.rows import Run
from secateur.comparison.setup import Setup
from secateur.comparison.work import Figures, Work, check_fit, timings
from secateur.errors import SecateurError
from secateur.measure import macs, peak_memory
from secateur.measure.cost import macs_and_memory
from secateur.method import method_class
from secateur.tasks.scenes import evaluate as scenes
from secateur.tasks.scenes.models import DEPTH, TOKENS, inputs, load_scenes
from secateur.tasks.scenes.questions import test_set
from secateur.tokens.attach import attach
from secateur.tokens.method import TokenMethod

FEW = 4
"""Pictures on which the target is searched: the count of tokens hardly depends on them."""


ASKED = 16
"""Questions of the batch whose cost is measured."""


def asked(model: nn.Module) -> dict[str, Tensor]:
    """A batch of questions of one kind about drawn scenes, as the model takes it."""
    group = test_set(4 * ASKED)[0]
    return inputs(model, group.pictures[:ASKED], group.questions[:ASKED])


class ScenesWork(Work):
    """Questions about drawn scenes: visual tokens leave while a small vision-language model answers; one model a seed."""

    verbs = ("attach",)
    costs = ("tokens",)
    metric, sign = "accuracy", 1
    usual = 128

    def __init__(self, setup: Setup):
        super().__init__(setup)
        self.variant = setup.task.partition(":")[2] or "llava"
        self.limit = setup.test or self.usual
        load_scenes(self.variant, 0)  # of a name that nobody knows no run is begun

    def dense(self, seed: int) -> Figures:
        found = self._figures(scenes.evaluate(None, None, self.variant, [seed], self.limit))
        model = load_scenes(self.variant, seed)
        return found | {"macs": 1.0, "peak_memory_bytes": peak_memory(model, asked(model))}

    def run(self, run: Run) -> Figures:
        kind = method_class(run.method)
        check_fit(self, kind, run.method, self.setup)
        if issubclass(kind, TokenMethod) and kind.memory is not TokenMethod.memory:
            raise SecateurError(
                "it remembers the steps of an episode, and questions are none",
                where=run.method,
                fix="compare it on a policy, such as that of benchmarks/rooms_minigrid.py",
            )
        if issubclass(kind, TokenMethod) and kind.asks:
            raise SecateurError(
                f"it is given a {' and a '.join(kind.asks)} of every picture, and questions come without",
                where=run.method,
                fix="compare it with benchmarks/salient_tokens.py",
            )
        budget = float(run.target.rstrip("%")) / 100 * TOKENS * DEPTH
        target, least = scenes.target_of_work(
            lambda target: self._score(run, target, FEW).tokens_layers, budget
        )
        if target is None:
            raise SecateurError(
                f"it can't do with less than {least / TOKENS / DEPTH:.1%} of the tokens x layers",
                where=run.method,
                fix="a larger budget",
            )
        found = self._figures(self._score(run, target, self.limit))
        shown = kept_tokens(
            load_scenes(self.variant, run.seed),
            run.method,
            target=target,
            seed=run.seed,
            **scenes.settings_of(run.method),
        )
        return found | self._cost(run, target) | {"target_given": target, "kept": shown}

    def _cost(self, run: Run, target: str) -> Figures:
        """Multiply-adds and peak memory of one batch of questions, and how long it takes beside the model with all tokens, in turn."""
        dense, model = (load_scenes(self.variant, run.seed) for _ in range(2))
        given = asked(model)
        found: Figures = {"not_measured": {"seconds": "nothing is pruned before the model runs"}}
        with attach(model, run.method, target=target, seed=run.seed, **scenes.settings_of(run.method)):
            own, found["peak_memory_bytes"] = macs_and_memory(model, given)
            found["macs"] = own / macs(dense, given)
            if self.setup.latency:
                return found | timings(dense, model, given)
        found["not_measured"]["forward_seconds"] = "it wasn't asked for"
        return found

    def _score(self, run: Run, target: str, limit: int) -> scenes.Score:
        where = (self.variant, [run.seed], limit)
        score = scenes.evaluate(run.method, target, *where, **scenes.settings_of(run.method))
        if score.missing:
            raise SecateurError(score.missing, where=run.method, fix="compare the others")
        return score

    def _figures(self, score: scenes.Score) -> Figures:
        return {
            "quality": score.mean[0] / 100,
            "parts": {kind: values[0] / 100 for kind, values in score.accuracy.items()},
            "tokens": score.tokens_layers / (TOKENS * DEPTH),
            "seconds_judging": score.seconds,
        }
