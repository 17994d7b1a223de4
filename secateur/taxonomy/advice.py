"""Advice on choosing a method."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from secateur.errors import choose
from secateur.taxonomy.axes import _DATA, HARDWARE, MethodInfo, _reasons, filter_records, parse_members
from secateur.taxonomy.measured import Comparison, fitting, standings

GOALS = ("speed", "storage", "training")
DENSE = ("gpu-dense", "cpu")
"""Hardware on which only smaller dense matrices are faster."""

Case = Callable[[MethodInfo, "Situation"], Any]


@dataclass(frozen=True)
class Situation:
    """The answers of a user; `recommend` says what they mean."""

    goal: str = "speed"
    hardware: str = "gpu-dense"
    train: bool = False
    data: str = "calib"
    model: str | None = None
    trained: bool = True
    high_ratio: bool = False
    heterogeneous: bool = False
    dynamic: bool | None = None

    @property
    def models(self) -> frozenset[str]:
        return parse_members("models", self.model) if self.model else frozenset()

    def settled(self) -> Situation:
        """With what follows from an answer for others. Raises `SecateurError` for an unknown one."""
        choose(self.goal, GOALS, error=f"unknown goal {self.goal!r}", where="recommend")
        choose(self.hardware, HARDWARE, error=f"unknown hardware {self.hardware!r}", where="recommend")
        choose(self.data, _DATA, error=f"unknown data {self.data!r}", where="recommend")
        if self.goal == "storage":
            return replace(self, hardware="storage", dynamic=bool(self.dynamic))
        if self.goal == "training":
            return replace(self, train=True, data="train", trained=False, dynamic=False)
        dynamic = bool(self.models & {"vlm", "vla"}) if self.dynamic is None else self.dynamic
        return replace(self, dynamic=dynamic)


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
    (
        lambda m, s: s.hardware == "gpu-2:4" and "N:M" in m.members("granularity"),
        "2:4 hardware runs what --target 2:4 leaves",
    ),
)
"""What puts a method before others: when, and the reason."""
NOTES: tuple[tuple[Case, str], ...] = (
    (lambda m, s: s.data == "none" and not s.dynamic, "without data expect a loss at high ratios"),
    (
        lambda m, s: s.train and s.high_ratio and "struct" in m.members("granularity"),
        "compare with training the thin network from scratch",
    ),
    (
        lambda m, s: (
            s.train and not s.high_ratio and m.training_free and "struct" in m.members("granularity")
        ),
        "then fine-tune the weights that are left",
    ),
    (
        lambda m, s: "LoRA" in m.members("recovery"),
        "a short training of LoRA adapters brings some of the loss back",
    ),
    (
        lambda m, s: not s.trained and s.goal != "training" and m.members("when") & {"PAT", "PAT-PT"},
        "train the whole model first: it ends more accurate than one that is cut before",
    ),
)
"""What to keep in mind: when, and the text."""
LATER: tuple[tuple[Callable[[Situation], Any], str], ...] = (
    (lambda s: s.train, "distil from the dense model while what is left is trained (--distill, --distil)"),
    (
        lambda s: s.heterogeneous or s.high_ratio,
        "search how much each layer keeps, rather than cut all alike (tyr, tas, pagcp, ecoflap, allocation=)",
    ),
    (lambda s: s.hardware == "gpu-2:4", "remove units first, then 2:4 of what is left"),
    (lambda s: not s.dynamic, "quantise last, after everything that prunes or trains"),
)
"""What to add where one method isn't enough, in this order: when, and the text."""


def recommend(
    records: Iterable[MethodInfo],
    *,
    goal: str = "speed",
    hardware: str = "gpu-dense",
    train: bool = False,
    data: str = "calib",
    model: str | None = None,
    trained: bool = True,
    high_ratio: bool = False,
    heterogeneous: bool = False,
    dynamic: bool | None = None,
    measured: Sequence[Comparison] | None = None,
    **overrides: Any,
) -> list[tuple[MethodInfo, str]]:
    """The methods that fit, best first, each with the reasons; the survey's advice as a decision list.

    `goal`: speed, storage (only size counts), or training (training itself is to cost less; it means --train, --data train and a
    model that isn't trained). `hardware`: gpu-dense, cpu, gpu-2:4, sparse (kernels exist) or storage. `train`: there is compute
    for training. `data`: none, calib (few samples) or train (the training set). `model`: a member of `AXES["models"]`; None: any.
    `trained`: False if the model is still to be trained. `high_ratio`: most of the network is to go. `heterogeneous`:
    its layers differ much. `dynamic`: decide per input; None: for models that read images as tokens (vlm, vla).
    `measured`: comparisons (`secateur.taxonomy.measured`): methods that have figures there come first, by their mean rank, and
    those without say so; a method of other models is there only with figures; None: no figures are asked for. `overrides` are filters of `filter_records` that replace the advice on
    their axis.

    >>> [info.title for info, why in recommend(RECORDS, hardware="gpu-dense", data="calib", model="llm")]
    ['NIRVANA', 'Tyr-the-Pruner']

    Raises `SecateurError` for an unknown answer. Source: survey-taxonomy, recommendation rules.
    """
    situation = Situation(
        goal, hardware, train, data, model, trained, high_ratio, heterogeneous, dynamic
    ).settled()
    models = situation.models
    rules = {"granularity": HARDWARE[situation.hardware], **_rules(situation)}
    if situation.hardware in DENSE:
        rules["speedup"] = {"univ"}
    # a user's own word on an axis replaces what would be derived from the situation
    for override, derived in (("recovery", "training_free"), ("when", "decision")):
        if override in overrides:
            rules.pop(derived, None)

    found = fitting(measured or (), models, situation.hardware in DENSE, situation.train)
    places = standings(found, high_ratio)
    answers: list[tuple[float, int, MethodInfo, str]] = []
    for info in filter_records(records, **rules | overrides):
        if info.criteria == {"none"}:  # chance is a baseline, not advice
            continue
        bonuses, notes = (
            [text for case, text in table if case(info, situation)] for table in (BONUSES, NOTES)
        )
        place, figures = places.get(info.name or info.spec, (math.nan, "not measured"))
        known = not models or "models" in overrides or models & info.members("models")
        if not known and math.isnan(place):
            continue
        if not known:
            notes.append(f"it was made for other models ({', '.join(sorted(info.members('models')))})")
        why = [*([] if measured is None else [figures]), *_reasons(info), *bonuses, *notes]
        answers.append((math.inf if math.isnan(place) else place, -len(bonuses), info, "; ".join(why)))
    answers.sort(key=lambda answer: answer[:2])
    return [(info, why) for *_, info, why in answers]


def combine(**answers: Any) -> list[str]:
    """What to add where one method isn't enough, in the order in which it is done; the answers are those of `recommend`.

    >>> combine(train=True)[-1]
    'quantise last, after everything that prunes or trains'
    """
    asked = {field.name: answers[field.name] for field in fields(Situation) if field.name in answers}
    situation = Situation(**asked).settled()
    return [text for case, text in LATER if case(situation)]


def _rules(situation: Situation) -> dict[str, Any]:
    """The filters that follow from whether there is data, training, and a choice per input."""
    rules: dict[str, Any] = {"when": {"PAT-PT"}}
    if situation.goal == "training":
        rules |= {"when": {"PBT", "PDT"}, "start": {"init", "scratch"}}
    elif situation.dynamic:
        rules |= {"when": {"RT"}, "decision": {"dyn"}}
    elif situation.train:
        rules["when"] = {"PAT", "PAT-PT", "PDT"}
    if not situation.train:
        rules["training_free"] = True
    return rules | {"data": _DATA[situation.data] + (("input",) if situation.dynamic else ())}
