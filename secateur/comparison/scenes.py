"""Questions about drawn scenes, for methods that drop visual tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from secateur.comparison.details import kept_tokens
from secateur.comparison.rows import Run
from secateur.comparison.setup import Setup
from secateur.comparison.work import Figures, Work, check_fit
from secateur.errors import SecateurError
from secateur.method import method_class
from secateur.tasks.scenes import evaluate as scenes
from secateur.tasks.scenes.models import DEPTH, TOKENS, load_scenes, scenes_tokenizer

CLOSE = 0.02
"""How far from the share of tokens x layers that was asked for a method may end, as it keeps whole tokens."""
FEW = 4
"""Pictures on which the target is searched: the count of tokens hardly depends on them."""


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
        low, high, middle = 0.0, 1.0, wanted
        best = (2.0, "100%")
        for _ in range(8):
            target = f"{middle * 100:.4g}%"
            try:
                share = self._figures(self._score(Run(method, target, seed), target, FEW))["tokens"]
            except SecateurError:  # too few tokens for the method's stages: it needs more
                share = 0.0
            best = min(best, (abs(share - wanted), target))
            if best[0] < CLOSE / 2:
                break
            low, high = (middle, high) if share < wanted else (low, middle)
            middle = (low + high) / 2
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
