"""LRP pruning: the filters and units through which least of the right class's logit comes are removed.

Yeom et al. 2021, "Pruning by explaining: A novel criterion for deep neural network pruning", Pattern Recognition 115,
https://arxiv.org/abs/1912.08881. Spec: lrp-pruning.

The authors state that a patent application covers this method ("patent pending") and publish their code under
CC BY-NC-SA 4.0. This is written from the equations alone; whether you may use the method is for you to find out.

Reconstruction: the sheet covers feed-forward nets and ResNets. Elsewhere attention hands relevance to its values, norms
and activations hand it on, and products of two activations halve it. A coupled unit has the relevance of all its filters
together. Of equal scores the later unit leaves first, as everywhere here; in the sheet it is the earlier one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur.context import Context
from secateur.errors import SecateurError
from secateur.graph import Group
from secateur.graph.groups import KINDS
from secateur.method import UnitMethod, register
from secateur.plan import Plan
from secateur.saliency.relevance import COMPOSITES, as_composite, in_float32, propagate
from secateur.stats.record import as_batches, evaluating, labels_in, run
from secateur.stats.units import slice_scores
from secateur.stats.windows import logits_of
from secateur.taxonomy import record

START = ("one", "logit")
NORMALISE = ("none", "sum")


@register
@dataclass
class LrpPruning(UnitMethod):
    """Channels, units and heads by the relevance that lands on their output, over a few labelled samples.

    >>> secateur.prune(resnet, x[:1], method="lrp-pruning", target="80%", data=(x, y))  # doctest: +SKIP

    Ten samples of each class are enough. Every layer receives the same total, so layers compare without normalisation.
    Data: pairs (inputs, class ids); token ids for language models, whose classes are the next tokens. Made for
    moderate cuts: beyond some 40 % of the units at once, units that only inhibit leave together and the network falls.
    `composite="epsilon-plus"` is the published choice for ResNets; `epsilon` did better on one (docs/results.md).
    """

    composite: str = field(
        default="z+",
        metadata={"help": f"rules of relevance: {', '.join(COMPOSITES)}", "choices": tuple(COMPOSITES)},
    )
    start: str = field(
        default="one", metadata={"help": "what the right class hands on: one, or its logit", "choices": START}
    )
    absolute: bool = field(
        default=True,
        metadata={"help": "add up magnitudes of relevance (the same for z+ without residual sums)"},
    )
    normalise: str = field(
        default="none", metadata={"help": "over a layer's filters: none, or sum", "choices": NORMALISE}
    )

    kinds: ClassVar[tuple[str, ...] | None] = tuple(kind for kind in KINDS if kind != "layers")
    needs: ClassVar[frozenset[str]] = frozenset({"relevance"})
    allocation: ClassVar[str] = "global"
    share_of: ClassVar[str] = "units"
    info = record("lrp-pruning")

    def plan(self, context: Context) -> Plan:
        scores = context.remember("scores", lambda: self.scores(context))
        missing = unseen(context.model, as_batches(context.require_data()))
        notes = {"classes": f"no sample of {missing}: what only they need leaves first"} if missing else {}
        return context.make_plan(keep=context.allocate(scores), notes=notes)

    def score(self, group: Group, context: Context) -> Tensor:
        return self.scores(context)[group.name]

    def scores(self, context: Context) -> dict[str, Tensor]:
        """[units] of every group whose layers receive relevance."""
        batches = as_batches(context.require_data())
        shown = context.progress(batches, "relevance", len(batches)) if context.progress else batches
        relevance = filter_relevance(context.model, shown, self.composite, self.start, self.absolute)
        if self.normalise == "sum":
            relevance = {key: r / r.sum().clamp_min(1e-30) for key, r in relevance.items()}
        found = {
            group.name: torch.stack(parts).sum(0)
            for group in context.groups
            if (parts := unit_relevance(group, context.graph.shapes, relevance))
        }
        if not found:
            raise SecateurError(
                f"no relevance lands on what {type(context.model).__name__} can lose",
                where=self.name,
                fix="use another criterion",
            )
        return found


def unit_relevance(
    group: Group, shapes: Mapping[str, tuple[int, ...]], relevance: Mapping[tuple[str, int], Tensor]
) -> list[Tensor]:
    """[units] for every layer that makes the group's units; shapes: of all parameters."""
    keys = [((s.name, shapes[s.name][s.dim]), s) for s in group.slices if s.role == "out"]
    return [slice_scores(relevance[key], s.dim, s.index).cpu() for key, s in keys if key in relevance]


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


def _without_labels(model: nn.Module, batch: Any) -> Any:
    if hasattr(batch, "keys"):
        return {key: value for key, value in batch.items() if key != "labels"}
    return batch if labels_in(model, batch) is None else batch[0]
