"""What the tests of weight methods share: a small matrix, its inputs, and comparisons."""

import torch

from secateur.stats.layer import InputStats, LayerStats

W = torch.tensor([[1, -2, 0.9, 3], [-0.4, 0.3, 2, -1]])


TOKENS = torch.tensor([[1.0, 0, 2, -1], [0, 1, 1, 1], [2, 1, 0, 0], [1, -1, 4, 0]])


def stats_of(rows, sequences=1, needs=("input_norm", "hessian")):
    inputs = InputStats(rows.shape[1], frozenset(needs))
    inputs.add(rows)
    inputs.sequences = sequences
    return LayerStats(inputs, name="layer")


def kept(mask):
    return [row.nonzero().flatten().tolist() for row in mask]


def near(found, expected, atol=1e-5):
    return torch.allclose(found, torch.tensor(expected), atol=atol)
