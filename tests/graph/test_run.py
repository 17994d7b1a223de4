"""Writes into parts of other tensors."""

from types import SimpleNamespace

import numpy as np
import torch

from secateur.graph.labels import Axes
from secateur.graph.run import _written


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
