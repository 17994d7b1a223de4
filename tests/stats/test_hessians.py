import torch
from torch import nn

from secateur.graph import trace
from secateur.stats.hessians import readers


def test_readers_of_what_leaves_are_marked_where_they_read_it():
    model = nn.Sequential(
        nn.Conv1d(3, 4, 1), nn.ReLU(), nn.Conv1d(4, 2, 2), nn.ReLU(), nn.Flatten(), nn.Linear(4, 5)
    )
    graph = trace(model, torch.randn(2, 3, 3))
    first, second = sorted(graph.prunable(), key=lambda g: -g.size)
    assert (first.size, second.size) == (4, 2)
    found = readers(graph, {first.name: torch.tensor([0, 2]), second.name: torch.tensor([0, 1])})
    assert list(found) == ["2.weight"]
    assert found["2.weight"].all(2).all(0).tolist() == [False, True, False, True]
    assert found["2.weight"].sum() == 2 * 2 * 2
    found = readers(graph, {second.name: torch.tensor([1])})
    assert found["5.weight"].int().tolist() == [[1, 1, 0, 0]] * 5 and list(found) == ["5.weight"]
