"""Advice on choosing a method."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from secateur.errors import choose
from secateur.taxonomy.axes import _DATA, HARDWARE, MethodInfo, _reasons, filter_records, parse_members


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

    rules: dict[str, Any] = {"granularity": HARDWARE[hardware]}
    if hardware in ("gpu-dense", "cpu"):
        rules["speedup"] = {"univ"}
    if dynamic:
        rules["when"], rules["decision"] = {"RT"}, {"dyn"}
    elif train:
        rules["when"] = {"PAT", "PAT-PT", "PDT"} if trained else {"PBT", "PDT"}
    else:
        rules["when"] = {"PAT-PT"}
    if not train:
        rules["training_free"] = True
    rules["data"] = _DATA[data] + (("input",) if dynamic else ())
    if models:
        rules["models"] = models
    if "recovery" in overrides:
        rules.pop("training_free", None)
    if "when" in overrides:
        rules.pop("decision", None)
    rules |= overrides

    answers: list[tuple[int, MethodInfo, str]] = []
    for info in filter_records(records, **rules):
        if info.criteria == {"none"}:  # chance is a baseline, not advice
            continue
        reasons = _reasons(info)
        bonus = []
        if high_ratio and train and ("iter" in info.members("order") or "REG" in info.criteria):
            bonus.append("iterative and regularised pruning hold up better at high ratios, and cost more")
        if not train and "shot" in info.members("order"):
            bonus.append("it is done in one shot")
        if heterogeneous and info.members("scope") & {"glob", "glob->loc"}:
            bonus.append(
                "it divides the budget globally, so layers that matter keep more; set floors per layer"
            )
        notes = []
        if data == "none" and not dynamic:
            notes.append("without data expect a loss at high ratios")
        if train and high_ratio and "struct" in info.members("granularity"):
            notes.append("compare with training the thin network from scratch")
        answers.append((len(bonus), info, "; ".join([*reasons, *bonus, *notes])))
    answers.sort(key=lambda answer: -answer[0])
    return [(info, why) for _, info, why in answers]
