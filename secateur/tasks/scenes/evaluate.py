"""Which token method keeps which answers: accuracy on `scenes` by kind of question, with the work that was done."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from secateur.tasks.scenes.draw import KINDS, decode
from secateur.tasks.scenes.models import DEPTH, TOKENS, inputs, load_scenes

TEST_SEED = 40_000_000
PART = 64


@dataclass
class Group:
    """Questions of one kind and one length: pictures uint8 [n, 3, 64, 64], word numbers, one answer each."""

    kind: str
    pictures: Tensor
    questions: list[list[int]]
    answers: Tensor
    images: list[int]


@functools.lru_cache(maxsize=4)
def test_set(images: int = 256) -> tuple[Group, ...]:
    """The questions that methods are judged by: one of each kind about each of the first `images` test pictures.

    >>> sum(len(group.questions) for group in test_set(8))  # doctest: +SKIP
    38

    Scenes are drawn 64 at a time from a seed of their own, so a smaller set is the beginning of a larger one. Pictures
    without anything to ask about (no shape that occurs once, say) have no question of that kind.
    """
    from secateur.tasks.scenes.train import draw

    rows: dict[tuple[str, int], list[tuple[Tensor, list[int], int, int]]] = {}
    for part in range(math.ceil(images / PART)):
        batch = draw(PART, KINDS, torch.Generator().manual_seed(TEST_SEED + part))
        for kind, asked in zip(KINDS, batch.asked):
            for row in range(min(PART, images - part * PART)):
                if asked.asked[row]:
                    length = int(asked.length[row])
                    one = (batch.pictures[row], asked.words[row, :length].tolist(), int(asked.answer[row]))
                    rows.setdefault((kind, length), []).append((*one, part * PART + row))
    return tuple(
        Group(
            kind,
            torch.stack([row[0] for row in found]),
            [row[1] for row in found],
            torch.tensor([row[2] for row in found]),
            [row[3] for row in found],
        )
        for (kind, _), found in rows.items()
    )


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


@torch.no_grad()
def accuracy(
    model: nn.Module, groups: Sequence[Group], batch: int = 64, after: Callable[[], None] = lambda: None
) -> dict[str, float]:
    """Accuracy in percent by kind: the most likely of all words after the question is the answer.

    >>> accuracy(load_scenes("llava"), test_set(128))  # doctest: +SKIP

    after: called when a batch is done.
    """
    right: dict[str, int] = {}
    asked: dict[str, int] = {}
    for group in groups:
        for start in range(0, len(group.questions), batch):
            rows = slice(start, start + batch)
            given = inputs(model, group.pictures[rows], group.questions[rows])
            logits = model(**given, logits_to_keep=1, use_cache=False).logits[:, -1]
            hits = int((logits.argmax(-1).cpu() == group.answers[rows]).sum())
            right[group.kind] = right.get(group.kind, 0) + hits
            asked[group.kind] = asked.get(group.kind, 0) + len(group.questions[rows])
            after()
    return {kind: 100 * right[kind] / asked[kind] for kind in sorted(asked, key=_order)}


def _order(kind: str) -> int:
    return KINDS.index(kind) if kind in KINDS else len(KINDS)


def evaluate(
    method: str | None,
    target: str | float | None = None,
    variant: str = "llava",
    seeds: Sequence[int] = (0, 1, 2),
    limit: int = 256,
    batch: int = 64,
    device: str | torch.device = "cpu",
    data: str = "scenes",
    **options: Any,
) -> Score:
    """Accuracy of the trained models of `seeds` under a token method, by kind of question.

    >>> evaluate("divprune", "25%", limit=64).accuracy  # doctest: +SKIP
    {'presence': [93.7, ...], 'colour': [...], ...}

    method None: every token stays. variant: also a folder that `train scenes` wrote, for one seed. data: `scenes`, or
    `easy_vqa` or `nlvr`, for a model that was tuned on it. limit: test pictures, each with up to five questions. options: what
    `secateur.attach` takes. A method that needs what the models don't have gives a score with `missing` set.
    """
    import secateur
    from secateur.tokens.state import Missing

    score = Score(method or "all tokens", str(target or "100%"), variant)
    begun = time.process_time()
    groups = test_set(limit)
    if data != "scenes":
        from secateur.tasks.scenes.real import real_test

        groups = real_test(data, limit)
    work = [0, 0, 0]
    for seed in seeds:
        model = load_scenes(variant, seed).to(device)
        if method is None:
            found = accuracy(model, groups, batch)
        else:
            try:
                with secateur.attach(model, method, target=target, seed=seed, **options) as attached:

                    def count(attached: Any = attached) -> None:
                        before, after = attached.report["before"], attached.report["after"]
                        for place, value in enumerate(
                            (before["visual_tokens"], before["tokens_x_layers"], after["tokens_x_layers"])
                        ):
                            work[place] += value

                    found = accuracy(model, groups, batch, count)
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
