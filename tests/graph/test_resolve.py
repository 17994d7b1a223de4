"""Labels along an axis, by hand."""

from types import SimpleNamespace

import numpy as np

from secateur.graph.build import _same_labels
from secateur.graph.labels import Axes, Labels
from secateur.graph.resolve import _varying


def test_what_varies_along_axes():
    labels = Labels()
    a, b, one = labels.new(6), labels.new(4), labels.new(3)
    labels.tie(one, one[:1])
    tracer = SimpleNamespace(labels=labels)

    def along(*layers, dims=(1,)):
        shape = np.broadcast_shapes(*(layer.shape for layer in layers))
        return _varying(tracer, Axes(shape, layers), dims)

    assert along(a.reshape(1, 6)).tolist() == a.tolist()
    assert along(one.reshape(1, 3)) is None and along(b.reshape(4, 1)) is None
    assert along(one.reshape(1, 3), labels.new(3).reshape(1, 3)).tolist() == [13, 14, 15]
    assert along(a.reshape(2, 3)) is False
    assert along(a.reshape(1, 2, 3), dims=(1, 2)).tolist() == a.tolist()
    assert along(a.reshape(1, 2, 3)[:, :, :1], np.zeros((1, 1, 3), int), dims=(1, 2)).tolist() == [
        0,
        0,
        0,
        3,
        3,
        3,
    ]


def test_labels_are_the_same_when_all_layers_are():
    labels = Labels()
    a, b, c = (labels.new(4).reshape(1, 4) for _ in range(3))
    labels.tie(a, b)
    tracer = SimpleNamespace(labels=labels)
    axes = lambda *layers: Axes((2, 4), layers)
    assert _same_labels(tracer, axes(a), axes(b)) and _same_labels(tracer, axes(a, c), axes(b, c))
    assert not _same_labels(tracer, axes(a, c), axes(b, a)) and not _same_labels(tracer, axes(a), axes(c))
    assert not _same_labels(tracer, axes(a), axes(b, c))
