"""Writes into parts of other tensors; calculations with the numbers of units."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from secateur.graph.labels import Axes
from secateur.graph.run import _written
from secateur.graph.tracer import Picked


def test_labels_that_a_base_does_not_know_are_frozen():
    """Known along axis 1; what is written along it may leave, what lies along axis 2 as well may not."""
    base = torch.zeros(2, 3, 4)
    known, new = np.arange(3).reshape(1, 3, 1), np.arange(3, 15).reshape(1, 3, 4)
    frozen = []
    tracer = SimpleNamespace(
        env=SimpleNamespace(get=lambda tensor: Axes((2, 3, 4), [known])),
        freeze=lambda layer, why: frozen.append(layer),
        reason=str,
    )
    _written(tracer, base[:], Axes((2, 3, 4), [known + 20]))
    assert not frozen
    _written(tracer, base[:], Axes((2, 3, 4), [known + 20, new]))
    assert len(frozen) == 1 and np.array_equal(frozen[0], new)
    _written(tracer, torch.zeros(2, 3, 4), Axes((2, 3, 4), [new]))
    assert len(frozen) == 1


CALCULATIONS = {
    "+ 1": lambda n: n + 1, "1 +": lambda n: 1 + n, "- 1": lambda n: n - 1, "9 -": lambda n: 9 - n, "* 3": lambda n: n * 3,
    "3 *": lambda n: 3 * n, "// 2": lambda n: n // 2, "9 //": lambda n: 9 // n, "% 2": lambda n: n % 2, "9 %": lambda n: 9 % n,
    "<": lambda n: n < 3, "<=": lambda n: n <= 2, ">": lambda n: n > 3, ">=": lambda n: n >= 2, "-": lambda n: -n,
    "**": lambda n: n**2, "str": str, "repr": repr, "format": "{}".format, "hash": hash, "== 2": lambda n: n == 2,
}  # fmt: skip


@pytest.mark.parametrize("name", CALCULATIONS)
def test_calculating_with_a_unit_s_number_freezes_the_units(name):
    frozen, picks = [], np.arange(4)
    tracer = SimpleNamespace(freeze=lambda ids, why: frozen.append(ids), reason=str, beyond=lambda picks: [5])
    number = Picked(2, tracer, picks)
    assert (
        list(range(9))[number] == 2 and number != 4 and number != 5 and not frozen
    )  # one past the last, or beyond
    assert CALCULATIONS[name](number) == CALCULATIONS[name](2)
    assert frozen and all(ids is picks for ids in frozen)
