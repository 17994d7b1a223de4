"""Which token method keeps which answers: accuracy on `scenes` by kind of question, with the work that was done."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from secateur.tasks.scenes.draw import KINDS, decode
from secateur.tasks.scenes.models import DEPTH, TOKENS, load_scenes, scenes_tokenizer
from secateur.tasks.scenes.questions import PART, Group, accuracy, test_set
from secateur.tasks.scenes.real import real_test
from secateur.tokens.attach import attach
from secateur.tokens.state import Missing

Judge = Callable[[Any, int, Callable[[], None]], dict[str, float]]
"""(model, seed, what to call after each batch) -> numbers in percent by name."""
OWN = {name: {"text": "embeddings"} for name in ("recoverable-compression", "cdpruner")}
"""Settings that a bench must give: there is no contrastive text tower, so likeness is taken in word embeddings."""


def settings_of(method: str) -> dict[str, Any]:
    """What `attach` is given for a method here beside its target."""
    return {"tokenizer": scenes_tokenizer(), **OWN.get(method, {})}


def target_of_work(work: Callable[[str], float], budget: float) -> tuple[str | None, float]:
    """(the largest target, in tenths of a percent, that does no more work than the budget, or None; the least work there is).

    >>> target_of_work(lambda target: 4 * round(0.64 * float(target.rstrip("%"))), 128)
    ('50.7%', 4)

    work: tokens x layers of a target; it grows with it.
    """
    low, high = math.ceil(1000 / TOKENS), 1000  # from one token on
    least = work(f"{low / 10:.1f}%")
    if least > budget:
        return None, least
    if work("100.0%") <= budget:
        return "100.0%", least
    while high - low > 1:  # low fits, high doesn't
        middle = (low + high) // 2
        low, high = (middle, high) if work(f"{middle / 10:.1f}%") <= budget else (low, middle)
    return f"{low / 10:.1f}%", least


def picture(number: int) -> tuple[Tensor, dict[str, tuple[str, str]]]:
    """Test picture `number` (uint8 [3, 64, 64]) and its questions: kind -> (question, answer).

    >>> picture(3)[1]["colour"]  # doctest: +SKIP
    ('what color is the cross ?', 'blue')
    """
    found, image = {}, None
    for group in test_set(math.ceil((number + 1) / PART) * PART):
        if number in group.images:
            row = group.images.index(number)
            image = group.pictures[row]
            found[group.kind] = (decode(group.questions[row]), decode([int(group.answers[row])]))
    assert image is not None
    return image, found


@dataclass
class Score:
    """How well the models of several seeds answer under one method and target. Accuracies in percent, a number a seed."""

    method: str
    target: str
    variant: str
    accuracy: dict[str, list[float]] = field(default_factory=dict)
    tokens_layers: float = 0.0
    seconds: float = 0.0
    missing: str | None = None

    @property
    def mean(self) -> list[float]:
        """The mean over the kinds, a number a seed."""
        return [sum(values) / len(values) for values in zip(*self.accuracy.values())]

    def row(self) -> dict[str, Any]:
        """The record as JSON."""
        return {
            "method": self.method,
            "target": self.target,
            "variant": self.variant,
            "accuracy": self.accuracy,
            "tokens_layers": self.tokens_layers,
            "seconds": round(self.seconds, 2),
            "missing": self.missing,
        }


def _answered(
    groups: Sequence[Group], batch: int, model: Any, seed: int, after: Callable[[], None]
) -> dict[str, float]:
    return accuracy(model, groups, batch, after)


def evaluate(
    method: str | None,
    target: str | float | None = None,
    variant: str = "llava",
    seeds: Sequence[int] = (0, 1, 2),
    limit: int = 256,
    batch: int = 64,
    device: str | torch.device = "cpu",
    data: str = "scenes",
    judge: Judge | None = None,
    **options: Any,
) -> Score:
    """Accuracy of the trained models of `seeds` under a token method, by kind of question.

    >>> evaluate("divprune", "25%", limit=64).accuracy  # doctest: +SKIP
    {'presence': [93.7, ...], 'colour': [...], ...}

    method None: every token stays. variant: also a folder that `train scenes` wrote, for one seed. data: `scenes`, or
    `easy_vqa` or `nlvr`, for a model that was tuned on it. limit: test pictures, each with up to five questions. judge: gives
    other numbers than those accuracies, (model, seed, what to call after each batch) -> {name: percent}. options: what
    `secateur.attach` takes. A method that needs what the models don't have gives a score with `missing` set.
    """
    score = Score(method or "all tokens", str(target or "100%"), variant)
    begun = time.process_time()
    if judge is None:
        groups = test_set(limit) if data == "scenes" else real_test(data, limit)
        judge = partial(_answered, groups, batch)
    work = [0, 0, 0]
    for seed in seeds:
        model = load_scenes(variant, seed).to(device)
        if method is None:
            found = judge(model, seed, lambda: None)
        else:
            try:
                with attach(model, method, target=target, seed=seed, **options) as attached:

                    def count(attached: Any = attached) -> None:
                        before, after = attached.report["before"], attached.report["after"]
                        for place, value in enumerate(
                            (before["visual_tokens"], before["tokens_x_layers"], after["tokens_x_layers"])
                        ):
                            work[place] += value

                    found = judge(model, seed, count)
            except Missing as error:
                score.missing = str(error)
                break
        for kind, share in found.items():
            score.accuracy.setdefault(kind, []).append(share)
    pictures = max(1, work[0] // TOKENS)
    score.tokens_layers = work[2] / pictures if method else float(TOKENS * DEPTH)
    score.seconds = time.process_time() - begun
    return score


def deviation(values: Sequence[float]) -> float:
    """Standard error of the mean of some seeds' numbers; NaN for fewer than two.

    >>> round(deviation([1.0, 2.0, 3.0]), 3)
    0.577
    """
    if len(values) < 2:
        return math.nan
    mean = sum(values) / len(values)
    return math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values))


def table(scores: Sequence[Score]) -> str:
    """The scores as a markdown table: mean and standard error over the seeds, percent."""

    def cell(values: Sequence[float]) -> str:
        if not values:
            return "-"
        mean, error = sum(values) / len(values), deviation(values)
        return f"{mean:.1f}" if math.isnan(error) else f"{mean:.1f} ± {error:.1f}"

    kinds = next((list(score.accuracy) for score in scores if score.accuracy), list(KINDS))
    lines = [
        f"| kept | method | tokens x layers | {' | '.join(kinds)} | mean |",
        "|---|---|---|" + "---|" * (len(kinds) + 1),
    ]
    for score in scores:
        if score.missing:
            lines.append(f"| {score.target} | {score.method} | {score.missing} |" + " |" * (len(kinds) + 1))
            continue
        shares = [cell(score.accuracy.get(kind, [])) for kind in kinds]
        lines.append(
            f"| {score.target} | {score.method} | {score.tokens_layers:.0f} | {' | '.join(shares)} | {cell(score.mean)} |"
        )
    return "\n".join(lines)


def above(score: Score, base: Score) -> tuple[float, float]:
    """How far a method's mean accuracy lies above another's, and that in standard errors over the paired seeds."""
    gaps = [a - b for a, b in zip(score.mean, base.mean)]
    mean = sum(gaps) / len(gaps)
    error = deviation(gaps)
    return mean, mean / error if error else math.inf
