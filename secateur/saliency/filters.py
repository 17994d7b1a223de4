"""Relevance that lands on a model's filters, added up over labelled samples, from the right classes' logits."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur.errors import SecateurError
from secateur.graph import Group
from secateur.saliency.relevance import as_composite, in_float32, propagate
from secateur.scores.lift import slice_scores
from secateur.utils.batches import inputs_of, labels_in
from secateur.utils.running import evaluating, logits_of, run


def filter_relevance(
    model: nn.Module, batches: Any, composite: str = "z+", start: str = "one", absolute: bool = True
) -> dict[tuple[str, int], Tensor]:
    """(weight's name, channels) -> float64 [channels]: relevance of the right class at the layer's output, added up over
    samples and positions.

    >>> filter_relevance(vgg, [(x, y)])["features.0.weight", 64].sum()  # doctest: +SKIP
    tensor(1., dtype=torch.float64)

    Each sample hands on 1 in all, or its logit. Scores of several batches are the sum of theirs. A tensor that is used in
    two ways (tied embeddings) has an entry for each. Raises `SecateurError` without labels, or with a label that isn't one.
    """
    model = in_float32(model)
    rules = as_composite(composite)
    totals: dict[tuple[str, int], Tensor] = {}
    aliases: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(parameter), []).append(name)
    same = {name: names for names in aliases.values() for name in names}

    def watch(name: str, relevance: Tensor) -> None:
        each = relevance.abs() if absolute else relevance
        each = each.reshape(-1, relevance.shape[-1]).sum(0).cpu().double()
        for alias in same[name]:
            key = (alias, len(each))
            totals[key] = totals[key] + each if key in totals else each

    for batch in batches:
        propagate(
            model,
            _without_labels(model, batch),
            partial(right_class, labels=classes_of(model, batch), start=start),
            rules,
            run=lambda model, batch: logits_of(run(model, batch)),
            watch=watch,
        )
    for (name, _), value in totals.items():
        if not torch.isfinite(value).all():
            raise SecateurError("its relevance is NaN or infinite", where=name, fix="check the data")
    return totals


def unit_relevance(
    group: Group, shapes: Mapping[str, tuple[int, ...]], relevance: Mapping[tuple[str, int], Tensor]
) -> list[Tensor]:
    """[units] for every layer that makes the group's units; shapes: of all parameters."""
    keys = [((s.name, shapes[s.name][s.dim]), s) for s in group.slices if s.role == "out"]
    return [slice_scores(relevance[key], s.dim, s.index).cpu() for key, s in keys if key in relevance]


def right_class(logits: Tensor, labels: Tensor, start: str = "one") -> Tensor:
    """Relevance that the logits begin with: one for every sample, or its logit, at the label; -100 has none.

    >>> right_class(torch.tensor([[1.0, 3.0]]), torch.tensor([1]), "logit")
    tensor([[0., 3.]])

    Several labels of one sample (positions) share alike.
    """
    labels = labels.to(logits.device)
    if labels.shape != logits.shape[:-1]:
        raise SecateurError(
            f"the logits are {tuple(logits.shape)}, the labels {tuple(labels.shape)}",
            where="data",
            fix="give one class id for every output",
        )
    counted = labels != -100
    classes = logits.shape[-1]
    if ((labels < 0) | (labels >= classes))[counted].any():
        raise SecateurError(
            f"labels run from {labels[counted].min()} to {labels[counted].max()}, the model has {classes} classes",
            where="data",
            fix=f"give class ids from 0 to {classes - 1}",
        )
    one = F.one_hot(labels.clamp_min(0), classes).to(logits) * counted[..., None]
    share = counted.reshape(len(labels), -1).sum(1).clamp_min(1).reshape(-1, *[1] * (logits.dim() - 1))
    return one / share * (logits if start == "logit" else 1)


def classes_of(model: nn.Module, batch: Any) -> Tensor:
    """The class ids of a batch; of token ids, the next ones, -100 for the last."""
    labels = labels_in(model, batch)
    if labels is None and hasattr(batch, "keys") and "labels" in batch:
        labels = batch["labels"]
    if labels is None:
        ids = batch.get("input_ids") if hasattr(batch, "keys") else batch
        if isinstance(ids, Tensor) and ids.dtype == torch.int64 and ids.dim() == 2:
            mask = batch.get("attention_mask") if hasattr(batch, "keys") else None
            following = ids.roll(-1, 1)
            if mask is not None:
                following = following.masked_fill(~(mask.bool() & mask.roll(-1, 1).bool()), -100)
            following[:, -1] = -100
            return following
        raise SecateurError(
            "there are no labels, and relevance starts from the right class",
            where="data",
            fix="give pairs (inputs, class ids), or the name of labelled pictures such as cifar10",
        )
    if labels.is_floating_point():
        raise SecateurError("the labels are no classes", where="data", fix="give class ids, integers")
    return labels


def unseen(model: nn.Module, batches: Any) -> str:
    """The classes of a classifier that no label names, in words; empty where all are there, and for language models."""
    labels = [classes_of(model, batch) for batch in batches]
    if labels[0].dim() != 1:
        return ""
    with torch.no_grad(), evaluating(model):
        count = logits_of(run(model, _without_labels(model, batches[0]))).shape[-1]
    named = {int(label) for some in labels for label in some.tolist()}
    missing = [c for c in range(count) if c not in named]
    few = f"{'class' if len(missing) == 1 else 'classes'} {', '.join(map(str, missing))}"
    return "" if not missing else few if len(missing) <= 5 else f"{len(missing)} of {count} classes"


def _without_labels(model: nn.Module, batch: Any) -> Any:
    if hasattr(batch, "keys"):
        return {key: value for key, value in batch.items() if key != "labels"}
    return inputs_of(model, batch)
