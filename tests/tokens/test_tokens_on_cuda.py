"""Token methods on an accelerator choose what they choose on the processor, and the model's logits agree.

Skipped where there is none; `SECATEUR_TEST_DEVICE=cpu` runs the same checks on the processor.
"""

import copy
import os

import pytest
import torch
from test_every_token_method import METHODS, lists, run
from tiny_models import inputs_for, make

from secateur.tokens import greedy
from secateur.tokens.counts import outlier_factor
from secateur.tokens.select import even_runs, quotas, top_per_group

DEVICE = torch.device(os.environ.get("SECATEUR_TEST_DEVICE", "cuda"))
pytestmark = pytest.mark.skipif(
    DEVICE.type == "cuda" and not torch.cuda.is_available(), reason="no accelerator"
)


@pytest.fixture(scope="module")
def models():
    model, inputs = make("llava-clip", torch.float32), inputs_for("llava-clip", torch.float32)
    there = copy.deepcopy(model).to(DEVICE), {key: value.to(DEVICE) for key, value in inputs.items()}
    return (model, inputs), there


@pytest.mark.parametrize("method", METHODS)
def test_the_same_tokens_stay(models, method):
    here, there = (run(*pair, method, "50%") for pair in models)
    assert lists(there[0].kept) == lists(here[0].kept)
    assert there[1].device.type == DEVICE.type
    assert torch.allclose(there[1].cpu(), here[1], atol=1e-3)


@pytest.mark.parametrize("lazy", [False, True])
def test_greedy_selection(lazy):
    x, keep = torch.randn(3, 40, 8), torch.tensor([5, 40, 11])
    valid = torch.arange(40) < torch.tensor([40, 40, 17])[:, None]
    distance = greedy.cosine_distance(x, valid)
    for pick in (greedy.max_min, greedy.max_sum, greedy.k_center):
        there = pick(distance.to(DEVICE), keep.to(DEVICE), valid.to(DEVICE))
        assert torch.equal(there.order.cpu(), pick(distance, keep, valid).order)
    gains = torch.rand(3, 20, 40) ** 4
    there = greedy.coverage(gains.to(DEVICE), keep.to(DEVICE), valid.to(DEVICE), lazy=lazy)
    assert torch.equal(there.order.cpu(), greedy.coverage(gains, keep, valid, lazy=lazy).order)


def test_budgets():
    scores, valid = torch.rand(4, 30), torch.rand(4, 30) > 0.2
    runs, sizes = even_runs(torch.ones_like(valid), 7)
    weights = torch.rand(4, 7).softmax(1)
    quota = quotas(weights, 12, sizes)
    assert torch.equal(quotas(weights.to(DEVICE), 12, sizes.to(DEVICE)).cpu(), quota)
    there = top_per_group(scores.to(DEVICE), runs.to(DEVICE), quota.to(DEVICE), valid.to(DEVICE))
    assert torch.equal(there.cpu(), top_per_group(scores, runs, quota, valid))
    factor = outlier_factor(scores.to(DEVICE), 5, valid.to(DEVICE)).cpu()
    assert torch.allclose(factor, outlier_factor(scores, 5, valid))
