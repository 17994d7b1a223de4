"""Closed-form repair against hand computations, and training that keeps masks, modules and names."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from secateur.errors import SecateurError
from secateur.solvers.batchnorm import reestimate_batchnorm
from secateur.solvers.least_squares import bias_compensation, least_squares
from secateur.training.recover import lora_targets, recover

X = torch.tensor([[1, 0, 1, 2], [0, 1, 1, 0], [1, 1, 0, 1]], dtype=torch.float64)
W = torch.tensor([[1, 2, -1], [0.5, -1, 3]], dtype=torch.float64)


# Closed forms


def test_least_squares_of_the_sheet() -> None:
    """Spec: spa, example (g): without input 0 the weight is [[0,2,0],[0,-1,3.5]], its squared error 3.75."""
    new = least_squares(W, 2 * X @ X.T, torch.tensor([1, 2]), damping=0)
    torch.testing.assert_close(new, torch.tensor([[0, 2, 0], [0, -1, 3.5]], dtype=torch.float64))
    assert ((new - W) @ X).square().sum().item() == pytest.approx(3.75)
    plain = W.clone()
    plain[:, 0] = 0
    assert ((plain - W) @ X).square().sum().item() == pytest.approx(7.5)


def test_least_squares_against_lstsq_and_obs() -> None:
    torch.manual_seed(0)
    x, w = torch.randn(6, 40, dtype=torch.float64), torch.randn(3, 6, dtype=torch.float64)
    keep, gone = torch.tensor([0, 2, 3, 5]), torch.tensor([1, 4])
    solution = torch.linalg.lstsq(x[keep].T, (w @ x).T).solution.T
    new = least_squares(w, x @ x.T, keep, damping=0)
    torch.testing.assert_close(new[:, keep], solution)
    assert not new[:, gone].any()
    h = x @ x.T
    h = h + 0.01 * h.diagonal().mean() * torch.eye(6, dtype=torch.float64)
    inverse = torch.linalg.inv(h)
    obs = w - w[:, gone] @ torch.linalg.inv(inverse[gone][:, gone]) @ inverse[gone]
    torch.testing.assert_close(least_squares(w, x @ x.T, keep, damping=0.01)[:, keep], obs[:, keep])


def test_least_squares_edges() -> None:
    w = torch.randn(3, 4)
    h = torch.randn(4, 9)
    h = h @ h.T
    assert torch.equal(least_squares(w, h, torch.arange(4)), w)
    assert not least_squares(w, h, torch.arange(0)).any()
    dead = torch.diag(torch.tensor([1.0, 0.0, 0.0, 2.0]))  # singular, and what leaves can't be replaced
    new = least_squares(w, dead, torch.tensor([0, 1]), damping=0)
    torch.testing.assert_close(new[:, :2], w[:, :2])
    half = least_squares(w.bfloat16(), h, torch.tensor([0, 2]))
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), least_squares(w, h, torch.tensor([0, 2])), rtol=0.02, atol=0.02)
    with pytest.raises(SecateurError, match="isn't finite"):
        least_squares(w, h * math.nan, torch.tensor([0]))
    with pytest.raises(SecateurError, match=r"\[3, 4\]"):
        least_squares(w, h[:3, :3], torch.tensor([0]))


def test_bias_compensation_of_the_sheet() -> None:
    """Spec: weight-baselines: dropping column 1 adds [-.5, .075]."""
    weight = torch.tensor([[1, -2, 0.9, 3], [-0.4, 0.3, 2, -1]])
    tokens = torch.tensor([[1, 0, 2, -1], [0, 1, 1, 1], [2, 1, 0, 0], [1, -1, 4, 0.0]])
    added = bias_compensation(weight, tokens.mean(0), torch.tensor([0, 2, 3]))
    torch.testing.assert_close(added, torch.tensor([-0.5, 0.075]))
    with pytest.raises(SecateurError, match="mean"):
        bias_compensation(weight, torch.zeros(3), torch.tensor([0]))


def test_bias_compensation_of_a_convolution_keeps_a_constant_channel() -> None:
    conv = nn.Conv2d(3, 4, 3, bias=True)
    x = torch.rand(2, 3, 6, 6)
    x[:, 1] = 0.7
    added = bias_compensation(conv.weight.detach(), torch.tensor([9.0, 0.7, 9.0]), torch.tensor([0, 2]))
    with torch.no_grad():
        whole = conv(x)
        conv.weight[:, 1] = 0
        conv.bias += added
        torch.testing.assert_close(conv(x), whole)


def test_batchnorm_statistics_are_the_average_over_batches() -> None:
    model = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(2, momentum=0.3)).eval()
    model[1].running_mean.fill_(50)
    batches = [torch.tensor([[1.0, 0.0], [3.0, 0.0]]), torch.tensor([[5.0, 2.0], [5.0, 4.0]])]
    assert reestimate_batchnorm(model, batches) == 1
    torch.testing.assert_close(model[1].running_mean, torch.tensor([3.5, 1.5]))  # (2 + 5) / 2, (0 + 3) / 2
    torch.testing.assert_close(model[1].running_var, torch.tensor([1.0, 1.0]))  # (2 + 0) / 2, (0 + 2) / 2
    assert model[1].momentum == 0.3 and not model[1].training
    with pytest.raises(SecateurError, match="no batches"):
        reestimate_batchnorm(model, [])
    torch.testing.assert_close(model[1].running_mean, torch.tensor([3.5, 1.5]))
    assert reestimate_batchnorm(nn.Linear(2, 2), []) == 0


# Training


def text(count: int = 12) -> Tensor:
    """Ids that count upwards: easy to learn."""
    start = torch.randint(0, 64, (count, 1), generator=torch.Generator().manual_seed(0))
    return (start + torch.arange(10)) % 64


def magnitude(model: nn.Module, share: float = 0.5) -> dict[str, Tensor]:
    masks = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            size = module.weight.abs()
            masks[f"{name}.weight"] = (
                size >= size.flatten().kthvalue(int(size.numel() * (1 - share)) + 1).values
            )
            with torch.no_grad():
                module.weight.mul_(masks[f"{name}.weight"])
    return masks


@pytest.mark.parametrize("how", ["lora", "full"])
def test_training_lowers_the_loss_and_zeros_stay_zero(how: str, tiny_llama: Callable[..., nn.Module]) -> None:
    model = tiny_llama()
    dense = copy.deepcopy(model)
    masks = magnitude(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses = recover(model, text(), how=how, steps=30, lr=0.01, teacher=dense, distill=0.1, masks=masks)
    assert sum(losses[-5:]) < 0.95 * sum(losses[:5])
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    assert {type(m).__name__ for m in model.modules()} == {type(m).__name__ for m in dense.modules()}
    for name, mask in masks.items():
        assert not after[name][~mask].any() and not torch.equal(after[name], before[name])
        assert (after[name][mask] != 0).float().mean() > 0.99
    embedding = "model.embed_tokens.weight"
    assert torch.equal(after[embedding], before[embedding]) == (how == "lora")
    assert all(p.requires_grad for p in model.parameters()) and not model.training


def test_merging_a_masked_update_changes_nothing(tiny_llama: Callable[..., nn.Module]) -> None:
    """The last loss seen in training, before the merge, is the merged model's at the step before: with a rate of 0
    at the last step the two models are one."""
    model = tiny_llama()
    masks = magnitude(model)
    seen: list[Tensor] = []
    ids = text()[:4]

    def watch(state: Any) -> None:
        if state.step == state.steps - 1:
            with torch.no_grad():
                seen.append(state.model(ids).logits)

    start = model(ids).logits.detach()
    recover(model, text(), steps=6, lr=0.05, masks=masks, after_step=[watch])
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, seen[0], rtol=0, atol=1e-5)
        assert not torch.allclose(start, seen[0], atol=1e-3)


def test_lora_of_conv1d_and_plain_modules() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    no_dropout = {f"{where}_pdrop": 0.0 for where in ("resid", "embd", "attn")}
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2, n_positions=32, **no_dropout)
    ).eval()
    assert lora_targets(model) == [
        f"transformer.h.0.{name}" for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    ]
    name = "transformer.h.0.mlp.c_fc.weight"
    mask = torch.rand(16, 64) > 0.5
    with torch.no_grad():
        model.get_parameter(name).mul_(mask)
    seen: list[Tensor] = []

    def watch(state: Any) -> None:
        seen.append(state.model(text()).logits.detach())

    recover(model, text(), steps=3, lr=0.05, masks={name: mask}, after_step=[watch])
    assert not model.get_parameter(name)[~mask].any()
    torch.testing.assert_close(model.eval()(text()).logits, seen[-1], rtol=0, atol=1e-4)

    net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))
    x = torch.randn(32, 4)
    losses = recover(net, (x, (x[:, 0] > 0).long()), steps=40, lr=0.05)
    assert losses[-1] < 0.7 * losses[0] and [type(m) for m in net] == [nn.Linear, nn.ReLU, nn.Linear]
    assert list(net.state_dict()) == ["0.weight", "0.bias", "2.weight", "2.bias"]


def test_layers_of_different_widths_recover(tiny_llama: Callable[..., nn.Module]) -> None:
    model = tiny_llama()
    mlp = model.model.layers[1].mlp
    for name in ("gate_proj", "up_proj"):
        getattr(mlp, name).weight = nn.Parameter(getattr(mlp, name).weight.detach()[:5])
        getattr(mlp, name).out_features = 5
    mlp.down_proj.weight = nn.Parameter(mlp.down_proj.weight.detach()[:, :5])
    mlp.down_proj.in_features = 5
    losses = recover(model, text(), steps=20, lr=0.01)
    assert losses[-1] < losses[0] and mlp.down_proj.weight.shape == (32, 5)


def test_a_failed_lora_leaves_the_model_as_it_was(tiny_llama: Callable[..., nn.Module]) -> None:
    model = tiny_llama().requires_grad_(False)
    before = copy.deepcopy(model)

    def broken(model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch).logits.sum() * math.nan

    with pytest.raises(SecateurError, match="step 0"):
        recover(model, text(), loss=broken, steps=2)
    assert repr(model) == repr(before) and not any(p.requires_grad for p in model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters()))
    assert vars(model).keys() == vars(before).keys()


def test_lora_resumes_to_the_same_bits(tiny_llama: Callable[..., nn.Module], tmp_path: Any) -> None:
    class Stop(Exception):
        pass

    def stop(state: Any) -> None:
        if state.step == 3:
            raise Stop

    straight, stopped = tiny_llama(), tiny_llama()
    settings: dict[str, Any] = {"steps": 6, "lr": 0.01, "seed": 1}
    recover(straight, text(), **settings)
    with pytest.raises(Stop):
        recover(stopped, text(), **settings, checkpoint=tmp_path / "run", every=2, after_step=[stop])
    recover(stopped, text(), **settings, checkpoint=tmp_path / "run", every=2)
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), stopped.parameters()))


def test_nonsense_is_refused(tiny_llama: Callable[..., nn.Module]) -> None:
    model = tiny_llama()
    name = "model.layers.0.mlp.up_proj.weight"
    cases: list[tuple[dict[str, Any], str]] = [
        ({"how": "prayer"}, "lora or full"),
        ({"masks": {"nothing": torch.ones(1, dtype=torch.bool)}}, "no such tensor"),
        ({"masks": {name: torch.ones(3, 3, dtype=torch.bool)}}, r"\[3, 3\]"),
        ({"masks": {name: torch.zeros(48, 32, dtype=torch.bool)}}, "isn't zero"),
        ({"targets": ["nowhere"]}, "nowhere"),
        ({"teacher": tiny_llama(), "loss": lambda m, b: 0}, "one of them"),
    ]
    for arguments, message in cases:
        with pytest.raises(SecateurError, match=message):
            recover(model, text(), steps=1, **arguments)
    with pytest.raises(SecateurError, match="no linear layer"):
        recover(nn.Sequential(nn.LayerNorm(3)), torch.rand(4, 3), steps=1)


def test_what_a_mask_removed_takes_no_part_in_clipping_and_hooks_of_the_caller_run() -> None:
    """The gradient is (3, 4); without the masked weight its norm is 3, so clipped to 1 the step of the other is the rate."""
    net = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[1.0, 0.0]]))
    seen: list[Any] = []
    losses = recover(
        net,
        [torch.tensor([[3.0, 4.0]])],
        how="full",
        steps=1,
        lr=0.5,
        masks={"weight": torch.tensor([[True, False]])},
        loss=lambda model, x: model(x).sum(),
        optimizer="sgd",
        momentum=0.0,
        warmup=0.0,
        after_backward=[lambda state: seen.append(net.weight.grad.tolist())],
        after_step=[lambda state: seen.append(net.weight[0, 0].item())],
    )
    assert losses == [3.0] and seen == [[[3.0, 4.0]], pytest.approx(0.5)]
    assert net.weight.tolist() == [[pytest.approx(0.5), 0.0]]
