"""The divergence of a model from what it was, over all its tokens' candidates: torch's own."""

import pytest
import torch
import torch.nn.functional as F

from secateur.stats import divergence as module
from secateur.stats.divergence import TopKDivergence


@pytest.mark.parametrize("form", ["ids", "ids one at a time", "inputs"])
def test_the_mean_over_positions_of_torch_s_divergence(form, tiny_llama, monkeypatch):
    model, ids = tiny_llama(), torch.randint(0, 64, (5, 8))
    if form == "ids one at a time":
        monkeypatch.setattr(module, "TOKENS_PER_BATCH", 4)
    samples = ids if form != "inputs" else [{"input_ids": row[None]} for row in ids]
    found = TopKDivergence(model, samples, k=64)
    batch = ((4, 8), (0, 3), (1, 8)) if form != "inputs" else ((4, 1), (0, 1), (1, 1))
    assert found(batch) == pytest.approx(0, abs=1e-6)
    with torch.no_grad():
        before = model(ids).logits.log_softmax(-1)
        model.model.layers[1].mlp.down_proj.weight.mul_(-40)
        after = model(ids).logits.log_softmax(-1)
    kl = F.kl_div(after, before, reduction="none", log_target=True).sum(-1)
    taken = [kl[s, : take - 1] if form != "inputs" else kl[s] for s, take in batch]
    assert found(batch) == pytest.approx(torch.cat(taken).mean().item(), rel=1e-3)
