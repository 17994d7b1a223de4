"""What must hold on an accelerator as well: devices and dtypes kept, plans that agree with the processor's.

Skipped where there is none; `SECATEUR_TEST_DEVICE=cpu` runs the same checks on the processor.
"""

import copy
import os

import pytest
import torch

import secateur
from secateur.method import method_class
from secateur.pruning.method import UnitMethod, WeightMethod

DEVICE = torch.device(os.environ.get("SECATEUR_TEST_DEVICE", "cuda"))
pytestmark = pytest.mark.skipif(
    DEVICE.type == "cuda" and not torch.cuda.is_available(), reason="no accelerator"
)
EVERY = [m for m in secateur.list_methods() if issubclass(method_class(m), WeightMethod | UnitMethod)]
METHODS = [m for m in EVERY if getattr(method_class(m), "kinds", None) not in (("experts",), ("novices",))]
QUICK = {"tyr": {"generations": 2, "offspring": 4}}


@pytest.fixture
def model(tiny_llama):
    return tiny_llama(
        num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4, head_dim=8, hidden_size=32
    )


def ids(model):
    return torch.randint(0, model.config.vocab_size, (6, 24), generator=torch.Generator().manual_seed(1))


def run(model, method, data, **more):
    return secateur.prune(
        model, method=method, target="50%", data=data, seqlen=24, **QUICK.get(method, {}), **more
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_device_and_dtype_are_kept_and_the_model_runs(model, method, dtype):
    data = ids(model)
    model = model.to(DEVICE, dtype)
    pruned = run(model, method, data)
    tensors = [*pruned.model.parameters(), *pruned.model.buffers()]
    assert {t.device.type for t in tensors} == {DEVICE.type}
    assert {p.dtype for p in pruned.model.parameters()} == {dtype}
    assert pruned.report["met"] is True
    assert pruned.model(data.to(DEVICE)).logits.isfinite().all()


@pytest.mark.parametrize("method", ["magnitude", "wanda", "random", "random-structured", "group-magnitude"])
def test_the_plan_is_that_of_the_processor(model, method):
    data = ids(model)
    here, there = copy.deepcopy(model), model.to(DEVICE)
    first, second = run(here, method, data), run(there, method, data)
    if method != "wanda":
        assert first.plan == second.plan
    else:
        same = [
            (a.cpu() == b.cpu()).float().mean()
            for a, b in zip(first.plan.masks.values(), second.plan.masks.values())
        ]
        assert min(same) > 0.99


def test_a_saved_result_loads_on_the_processor_and_on_the_device(model, tmp_path):
    data = ids(model)
    pruned = run(model.to(DEVICE), "group-magnitude", data)
    pruned.save(tmp_path / "out")
    loaded, _ = secateur.load(tmp_path / "out")
    expected = pruned.model(data.to(DEVICE)).logits.cpu()
    torch.testing.assert_close(loaded(data).logits, expected, atol=1e-3, rtol=1e-3)


def test_networks_of_convolutions_are_cut_and_proven_on_the_device():
    timm = pytest.importorskip("timm")
    net = timm.create_model("resnet18", num_classes=10).eval().to(DEVICE)
    x = torch.randn(2, 3, 64, 64, device=DEVICE)
    pruned = secateur.prune(net, x, method="group-magnitude", target="50%")
    assert pruned.model(x).shape == (2, 10)
    assert all(p.device.type == DEVICE.type for p in pruned.model.parameters())
    assert sum(p.numel() for p in pruned.model.parameters()) < 0.45 * sum(p.numel() for p in net.parameters())
