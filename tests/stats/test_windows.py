"""How far a masked model is from itself, by torch's own divergence."""

import copy

import pytest
import torch
import torch.nn.functional as F

from secateur.graph import trace
from secateur.stats.windows import kl_divergence, masked_divergence


def test_the_divergence_of_a_model_without_some_neurons(tiny_llama):
    model, ids = tiny_llama(), torch.randint(0, 64, (3, 7))
    graph = trace(model, ids[:1])
    kept = torch.arange(10)
    found = masked_divergence(model, graph, {"model.layers.0.mlp:neurons": kept}, ids)
    pruned = copy.deepcopy(model)
    with torch.no_grad():
        pruned.model.layers[0].mlp.down_proj.weight[:, 10:] = 0
        p, q = (m(ids).logits.log_softmax(-1) for m in (model, pruned))
    assert found == pytest.approx(F.kl_div(q, p, reduction="sum", log_target=True).item() / 21, rel=1e-3)
    assert found == pytest.approx(kl_divergence(model, pruned, ids)) and found > 0
