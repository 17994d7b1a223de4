"""Advice on choosing a method."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from secateur.errors import choose
from secateur.taxonomy.axes import _DATA, HARDWARE, MethodInfo, _reasons, filter_records, parse_members

Case = Callable[[MethodInfo, "Situation"], Any]


@dataclass(frozen=True)
class Situation:
    """The answers of a user."""

    train: bool
    data: str
    trained: bool
    high_ratio: bool
    heterogeneous: bool
    dynamic: bool


BONUSES: tuple[tuple[Case, str], ...] = (
    (
        lambda m, s: s.high_ratio and s.train and ("iter" in m.members("order") or "REG" in m.criteria),
        "iterative and regularised pruning hold up better at high ratios, and cost more",
    ),
    (lambda m, s: not s.train and "shot" in m.members("order"), "it is done in one shot"),
    (
        lambda m, s: s.heterogeneous and m.members("scope") & {"glob", "glob->loc"},
        "it divides the budget globally, so layers that matter keep more; set floors per layer",
    ),
)
"""What puts a method before others: when, and the reason."""
NOTES: tuple[tuple[Case, str], ...] = (
    (lambda m, s: s.data == "none" and not s.dynamic, "without data expect a loss at high ratios"),
    (
        lambda m, s: s.train and s.high_ratio and "struct" in m.members("granularity"),
        "compare with training the thin network from scratch",
    ),
)
"""What to keep in mind: when, and the text."""


def recommend(
    records: Iterable[MethodInfo],
    *,
    hardware: str = "gpu-dense",
    train: bool = False,
    data: str = "calib",
    model: str | None = None,
    trained: bool = True,
    high_ratio: bool = False,
    heterogeneous: bool = False,
    dynamic: bool | None = None,
    **overrides: Any,
) -> list[tuple[MethodInfo, str]]:
    """The methods that fit, best first, each with the reasons; the survey's advice as a decision list.

    `hardware`: gpu-dense, cpu, gpu-2:4, sparse (kernels exist) or storage. `train`: there is compute for training.
    `data`: none, calib (few samples) or train (the training set). `model`: a member of `AXES["models"]`; None: any.
    `trained`: False if the model is still to be trained. `high_ratio`: most of the network is to go. `heterogeneous`:
    its layers differ much. `dynamic`: decide per input; None: for models that read images as tokens (vlm, vla).
    `overrides` are filters of `filter_records` that replace the advice on their axis.

    >>> [info.title for info, why in recommend(RECORDS, hardware="gpu-dense", data="calib", model="llm")]
    ['NIRVANA', 'Tyr-the-Pruner']

    Raises `SecateurError` for an unknown answer. Source: survey-taxonomy, recommendation rules.
    """
    choose(hardware, HARDWARE, error=f"unknown hardware {hardware!r}", where="recommend")
    choose(data, _DATA, error=f"unknown data {data!r}", where="recommend")
    models = parse_members("models", model) if model else frozenset()
    if dynamic is None:
        dynamic = bool(models & {"vlm", "vla"})

    situation = Situation(train, data, trained, high_ratio, heterogeneous, dynamic)
    rules = {"granularity": HARDWARE[hardware], **_rules(situation)}
    if hardware in ("gpu-dense", "cpu"):
        rules["speedup"] = {"univ"}
    if models:
        rules["models"] = models
    # a user's own word on an axis replaces what would be derived from the situation
    for override, derived in (("recovery", "training_free"), ("when", "decision")):
        if override in overrides:
            rules.pop(derived, None)

    answers: list[tuple[int, MethodInfo, str]] = []
    for info in filter_records(records, **rules | overrides):
        if info.criteria == {"none"}:  # chance is a baseline, not advice
            continue
        bonuses, notes = (
            [text for case, text in table if case(info, situation)] for table in (BONUSES, NOTES)
        )
        answers.append((len(bonuses), info, "; ".join([*_reasons(info), *bonuses, *notes])))
    answers.sort(key=lambda answer: -answer[0])
    return [(info, why) for _, info, why in answers]


def _rules(situation: Situation) -> dict[str, Any]:
    """The filters that follow from whether there is data, training, and a choice per input."""
    rules: dict[str, Any] = {"when": {"PAT-PT"}}
    if situation.dynamic:
        rules |= {"when": {"RT"}, "decision": {"dyn"}}
    elif situation.train:
        rules["when"] = {"PAT", "PAT-PT", "PDT"} if situation.trained else {"PBT", "PDT"}
    if not situation.train:
        rules["training_free"] = True
    return rules | {"data": _DATA[situation.data] + (("input",) if situation.dynamic else ())}
