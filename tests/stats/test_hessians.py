import pytest
import torch
from torch import nn

from secateur.errors import SecateurError
from secateur.graph import trace
from secateur.graph.blocks import every_matrix
from secateur.stats import hessians as module
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


@pytest.mark.parametrize(
    ("memory", "runs"), [(1e9, [["0", "2", "3"]]), (4 * 25.0, [["0", "2"], ["3"]]), (99.0, [["0"], ["2"], ["3"]])], ids=str
)  # fmt: skip
def test_few_hessians_are_held_at_once(memory, runs, monkeypatch):
    """Of 9, 16 and 36 numbers of 4 bytes: the first two are 100 bytes."""
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 6), nn.Linear(6, 2))
    x, sets, record = torch.randn(5, 3), [], module._record
    monkeypatch.setattr(module, "_record", lambda *a: (sets.append([n[0] for n in a[2]]), record(*a))[1])
    found = list(module.hessians(model, x, every_matrix(model), memory=memory))
    assert sets == runs
    assert [matrix.name for matrix, _ in found] == ["0.weight", "2.weight", "3.weight"]
    hidden = model[0](x).relu().detach()
    for (_, stats), rows in zip(found, (x, hidden, model[2](hidden).detach()), strict=True):
        torch.testing.assert_close(stats.hessian, 2 / 5 * rows.T @ rows)
    assert list(module.hessians(model, x, {})) == []


def test_the_model_is_as_it_was_and_layers_that_do_not_run_have_the_identity():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle, self.drop = nn.Linear(3, 2), nn.Linear(2, 2), nn.Dropout(0.9)

        def forward(self, x):
            return self.used(self.drop(x))

    net, x = Net().train(), torch.randn(4, 3)
    found = {m.name: s.hessian for m, s in module.hessians(net, [x[:1], x[1:]], every_matrix(net))}
    torch.testing.assert_close(found["used.weight"], 2 / 4 * x.T @ x)  # without dropout, over both batches
    assert torch.equal(found["idle.weight"], torch.eye(2)) and net.training and net.drop.training
    with pytest.raises(SecateurError, match="used"):
        list(module.hessians(net, torch.tensor([[1.0, float("nan"), 1]]), every_matrix(net)))
