"""Models that accelerate laid out over devices: its hooks change nothing, and weights that aren't in memory are refused.

There is one device here, so the layout names it for every block, with the hooks that several would have. What brings tensors of
several devices together is tried with meta as the other one, which holds no values.
"""

from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from torch import nn
from transformers import AutoModelForCausalLM

import secateur
from secateur.errors import SecateurError
from secateur.graph import Group, Slice

IDS = torch.randint(64, (4, 16), generator=torch.Generator().manual_seed(1))
PLACES = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}


def laid_out(model: Any) -> nn.Module:
    places = PLACES | {f"model.layers.{index}": "cpu" for index in range(len(model.model.layers))}
    return dispatch_model(model, device_map=places, force_hooks=True)


@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules")
@pytest.mark.parametrize(
    ("method", "target", "settings"),
    [
        ("sparsegpt", "50%", {"inplace": True}),
        ("magnitude", "50%", {"scope": "global"}),
        ("wanda", "50%", {"repair": "reconstruct", "repair_passes": 1}),
        ("flap", "70%", {}),
        ("taylor", "70%", {"inplace": True}),
        ("shortgpt", "70%", {}),
    ],
)
def test_the_hooks_of_a_device_map_change_nothing(
    method: str, target: str, settings: dict, tiny_llama: Any, tmp_path: Any
) -> None:
    model = laid_out(tiny_llama(num_hidden_layers=3))
    asked: dict[str, Any] = {"method": method, "target": target, "data": IDS, **settings}
    ours = secateur.prune(model, **asked)
    whole = secateur.prune(tiny_llama(num_hidden_layers=3), **asked).model
    assert hasattr(ours.model.model.layers[0], "_hf_hook")
    ours.save(tmp_path / "out")
    loaded, _ = secateur.load(tmp_path / "out")
    for other in (ours.model, loaded):
        with torch.no_grad():
            assert torch.equal(other(IDS).logits, whole(IDS).logits)


def test_weights_that_are_not_in_memory_are_refused(tiny_llama: Any, tmp_path: Any) -> None:
    tiny_llama().save_pretrained(tmp_path / "dense")
    places = PLACES | {"model.layers.0": "cpu", "model.layers.1": "disk"}
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "dense", device_map=places, offload_folder=tmp_path / "offload"
    )
    before = model(IDS).logits
    with pytest.raises(SecateurError, match=r"layers\.1\..*aren't in memory.*--stream"):
        secateur.prune(model, method="wanda", target="50%", data=IDS)
    assert torch.equal(model(IDS).logits, before)


def test_what_a_unit_owns_may_lie_on_several_devices() -> None:
    index = torch.arange(2)[:, None]
    group = Group("x", "hidden", 2, (Slice("a.weight", 0, index, "out"), Slice("b.weight", 1, index, "in")))
    blocks = Group("l", "layers", 2, modules=("a", "b"))
    values = {"a.weight": torch.empty(2, 3, device="meta"), "b.weight": torch.ones(4, 2)}
    for how in ("sum", "mean"):
        assert group.reduce(values, how).device == torch.device("meta")
        assert blocks.reduce(values, how).device == torch.device("meta")
