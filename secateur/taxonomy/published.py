"""The page of this field: the published systems, what they do, and which of them stand here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from secateur.taxonomy.axes import MethodInfo, notation

TOOLS = {
    "survey-taxonomy": ("secateur methods", "secateur recommend"),
    "robustness-lottery": ("secateur.measure.geometry",),
}
"""Systems that are no method, and what does here what they do."""


def here(info: MethodInfo, own: Iterable[MethodInfo]) -> list[str]:
    """The names of what this library has of a published system: methods of the same sheet, or what does the same.

    >>> here(record("spa"), own)  # doctest: +SKIP
    ['obspa', 'spa']
    """
    return [*TOOLS.get(info.spec, ()), *sorted(one.name for one in own if one.spec == info.spec)]


def counts(records: Sequence[MethodInfo]) -> dict[str, Any]:
    """How many of the records are what.

    >>> counts(RECORDS)["token objects"], counts(RECORDS)["training-free"]
    (23, 26)
    """
    return {
        "systems": len(records),
        "token objects": sum("T" in info.objects for info in records),
        "training-free": sum(info.training_free for info in records),
        "static": sum(info.decision == "stat" for info in records),
        "dynamic": sum(info.decision == "dyn" for info in records),
        "need sparse kernels": sum(info.kernel_needed for info in records),
        "granularity": dict(Counter(notation(info, "granularity") for info in records).most_common()),
        "when": dict(Counter(notation(info, "when") for info in records).most_common()),
    }
