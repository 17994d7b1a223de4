"""Hidden units of recurrent layers: the same row of every gate, in both directions and all layers, and their columns."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from secateur.graph import trace
from secateur.surgery import cut_units, prove

KEPT, GATES = torch.tensor([0, 2, 5]), {"LSTM": 4, "GRU": 3, "RNN": 1}
LENGTHS = torch.tensor([3, 5, 2])


class Tagger(nn.Module):
    def __init__(self, kind, packed, **settings):
        super().__init__()
        self.packed, self.batch_first = packed, settings.get("batch_first", True)
        self.words, self.inside = nn.Embedding(20, 4), nn.Linear(4, 5)
        self.memory = getattr(nn, kind)(5, 6, **{"batch_first": True, **settings})
        self.tags = nn.Linear(
            (settings.get("proj_size") or 6) * (1 + settings.get("bidirectional", False)), 3
        )

    def forward(self, words):
        x = self.inside(self.words(words))
        if not self.batch_first:
            x = x.transpose(0, 1)
        if not self.packed:
            return self.tags(self.memory(x)[0])
        x = pack_padded_sequence(x, LENGTHS, batch_first=self.batch_first, enforce_sorted=False)
        return self.tags(pad_packed_sequence(self.memory(x)[0], batch_first=self.batch_first)[0])


SETTINGS = [
    {},
    {"num_layers": 2},
    {"bidirectional": True},
    {"num_layers": 2, "bidirectional": True, "batch_first": False},
    {"bias": False},
]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: "-".join(s) or "plain")
@pytest.mark.parametrize("kind", list(GATES))
def test_units_leave_all_gates_and_give_what_zeros_give(kind, settings, packed):
    torch.manual_seed(0)
    model, words = Tagger(kind, packed, **settings).eval(), torch.randint(20, (3, 5))
    graph = trace(model, words)
    assert graph.rule_errors == [] and graph.unknown == {}
    (group,) = (g for g in graph.prunable() if g.size == 6)
    keep = {group.name: KEPT}
    assert group.exact and prove(model, graph, keep, words) == {}
    zeroed = copy.deepcopy(model)
    gone = [n for n in range(6) if n not in KEPT.tolist()]
    with torch.no_grad():  # a unit without weights is zero at every step, whatever the gates say
        for name, p in zeroed.memory.named_parameters():
            for gate in range(GATES[kind]):
                p[[gate * 6 + n for n in gone]] = 0
            if "weight_hh" in name:
                p[:, gone] = 0
    expected = zeroed(words)
    cut_units(model, graph, keep)
    assert model.memory.hidden_size == 3 and model.tags.in_features == 3 * (1 + model.memory.bidirectional)
    torch.testing.assert_close(model(words), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("packed", [False, True])
def test_projected_units_and_their_projection_are_cut_apart(packed):
    torch.manual_seed(0)
    model, words = Tagger("LSTM", packed, num_layers=2, proj_size=4).eval(), torch.randint(20, (3, 5))
    graph = trace(model, words)
    hidden, projected = (
        next(g for g in graph.prunable() if g.size == n and "memory" in g.name) for n in (6, 4)
    )
    assert {(s.name, s.dim) for s in projected.slices} >= {
        ("memory.weight_hr_l0", 0), ("memory.weight_hh_l0", 1), ("memory.weight_ih_l1", 1), ("tags.weight", 1),
    }  # fmt: skip
    keep = {hidden.name: KEPT, projected.name: torch.tensor([1, 3])}
    assert prove(model, graph, keep, words) == {}
    cut_units(model, graph, keep)
    assert (model.memory.hidden_size, model.memory.proj_size, model.tags.in_features) == (3, 2, 2)


@pytest.mark.parametrize("kind", ["LSTMCell", "GRUCell"])
def test_a_cell_stepped_by_hand(kind):
    class Stepped(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell, self.tags = getattr(nn, kind)(5, 6), nn.Linear(6, 3)

        def forward(self, x):
            state = None
            for step in x.unbind(1):
                state = self.cell(step, state)
            return self.tags(state[0] if kind == "LSTMCell" else state)

    torch.manual_seed(0)
    model, x = Stepped().eval(), torch.randn(2, 4, 5)
    graph = trace(model, x)
    (group,) = graph.prunable()
    assert group.size == 6 and prove(model, graph, {group.name: KEPT}, x) == {}
    cut_units(model, graph, {group.name: KEPT})
    assert model.cell.hidden_size == 3 and model(x).shape == (2, 3)
