"""Questions about drawn scenes, for methods that drop visual tokens."""

from __future__ import annotations

from secateur.comparison.details import kept_tokens
from secateur.comparison.rows import Run
from secateur.comparison.setup import Setup
from secateur.comparison.work import Figures, Work, check_fit
from secateur.errors import SecateurError
from secateur.method import method_class
from secateur.tasks.scenes import evaluate as scenes
from secateur.tasks.scenes.models import DEPTH, TOKENS, load_scenes
from secateur.tokens.method import TokenMethod

FEW = 4
"""Pictures on which the target is searched: the count of tokens hardly depends on them."""


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
        return self._figures(scenes.evaluate(None, None, self.variant, [seed], self.limit))

    def run(self, run: Run) -> Figures:
        kind = method_class(run.method)
        check_fit(self, kind, run.method, self.setup)
        if issubclass(kind, TokenMethod) and kind.memory is not TokenMethod.memory:
            raise SecateurError(
                "it remembers the steps of an episode, and questions are none",
                where=run.method,
                fix="compare it on a policy, such as that of benchmarks/rooms_minigrid.py",
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
        return found | {"target_given": target, "kept": shown}

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
