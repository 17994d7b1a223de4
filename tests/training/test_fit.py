"""The training loop: it learns, repeats to the bit, survives being killed, and stops where numbers break."""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

from secateur.errors import SecateurError
from secateur.training.fit import Draw, default_loss, fit, next_token_loss, schedule
from secateur.training.state import Hook, State

KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
from test_fit import train
train(sys.argv[2], lambda state: state.step == 7 and os.kill(os.getpid(), signal.SIGKILL))
"""


def train(checkpoint: str | Path | None, hook: Hook = lambda state: None) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Dropout(0.3), nn.ReLU(), nn.Linear(16, 3))
    data = pairs(40)
    losses = fit(model, data, steps=12, lr=0.01, batch=7, after_step=[hook], checkpoint=checkpoint, every=3)
    return dict(model.state_dict()) | {"losses": torch.tensor(losses, dtype=torch.float64)}


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Dropout(0.2), nn.ReLU(), nn.Linear(16, 3))


def pairs(count: int = 40) -> tuple[Tensor, Tensor]:
    x = torch.randn(count, 6, generator=torch.Generator().manual_seed(1))
    return x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long()


def test_one_step_is_adamw_by_hand() -> None:
    """Step 1 of Adam moves each weight by lr * g / (|g| + eps); decay first scales the matrix by 1 - lr * decay."""
    model = nn.Linear(2, 1)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.5, -1.0]]))
        model.bias.zero_()
    x = torch.tensor([[2.0, 3.0]])

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch).square().mean()

    losses = fit(model, x, steps=1, lr=0.1, batch=1, loss=loss, warmup=0, weight_decay=0.5, clip=0)
    assert losses == [
        4.0
    ]  # (2 * 0.5 - 3)^2; its gradient is 2 * -2 * x, negative: both weights and the bias go up
    torch.testing.assert_close(model.weight.detach(), torch.tensor([[0.5 * 0.95 + 0.1, -0.95 + 0.1]]))
    torch.testing.assert_close(model.bias.detach(), torch.tensor([0.1]))


def test_it_learns_and_restores_modes() -> None:
    model = net().eval()
    model[1].train()
    losses = fit(model, pairs(), steps=150, lr=0.02)
    assert sum(losses[-20:]) < 0.5 * sum(losses[:20])
    assert not model.training and model[1].training and model[0].weight.grad is None


def test_seed_decides_the_result_and_the_callers_random_state_is_left() -> None:
    one, two, other = net(), net(), net()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = fit(one, pairs(), steps=5, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(7)
    assert fit(two, pairs(), steps=5, seed=3) == first
    assert fit(other, pairs(), steps=5, seed=4) != first
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters()))


def test_schedule() -> None:
    rates = [schedule(step, 10, 0.2) for step in range(10)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert rates[6] == pytest.approx(0.5) and rates == sorted(rates[:2]) + sorted(rates[2:], reverse=True)
    assert schedule(0, 5, 0) == 1.0 and schedule(4, 5, 1.0) == 1.0


def test_every_sample_comes_once_an_epoch_in_a_new_order() -> None:
    draw = Draw(torch.arange(10), 4, seed=0)
    seen = torch.cat([draw(step) for step in range(5)]).tolist()
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10)) and seen[:10] != seen[10:]
    again = Draw(torch.arange(10), 4, seed=0)
    assert again(4).tolist() == seen[16:]  # a later step needs none of the earlier ones
    ready = Draw([{"x": torch.tensor([7.0])}, {"x": torch.tensor([8.0])}], 4, seed=0)
    assert sorted(ready(step)["x"].item() for step in range(2)) == [7.0, 8.0]


def test_gradients_are_clipped_and_hooks_run_in_their_places() -> None:
    seen: list[tuple[str, int, float]] = []
    norms: list[float] = []

    def backward(state: State) -> None:
        norms.append(torch.cat([p.grad.flatten() for p in state.model.parameters()]).norm().item())
        seen.append(("backward", state.step, state.model[0].bias[0].item()))

    def step(state: State) -> None:
        norm = torch.cat([p.grad.flatten() for p in state.model.parameters()]).norm().item()
        assert norm <= 0.01 * (1 + 1e-4) < norms[-1] and math.isfinite(state.loss)
        seen.append(("step", state.step, state.model[0].bias[0].item()))

    fit(net(), pairs(), steps=2, lr=0.1, clip=0.01, warmup=0, after_backward=[backward], after_step=[step])
    assert [(name, number) for name, number, _ in seen] == [
        ("backward", 0),
        ("step", 0),
        ("backward", 1),
        ("step", 1),
    ]
    assert seen[0][2] != seen[1][2] == seen[2][2]


def test_loss_terms_are_added_and_extra_parameters_train() -> None:
    gate = nn.Parameter(torch.tensor([3.0]))
    model = net()
    groups = [{"params": list(model.parameters())}, {"params": [gate], "lr": 0.5}]
    plain = fit(net(), pairs(), steps=1)
    losses = fit(
        model,
        pairs(),
        steps=1,
        warmup=0,
        parameters=groups,
        loss_terms=[lambda model, batch: gate.square().sum()],
    )
    assert losses[0] == pytest.approx(plain[0] + 9.0)
    assert gate.item() == pytest.approx(2.5)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_nan_stops_before_the_weights_change(where: str) -> None:
    model = net()

    def loss(model: nn.Module, batch: Any) -> Tensor:
        value = default_loss(model, batch)
        if loss.calls == 2:  # type: ignore[attr-defined]
            if where == "loss":
                value = value * math.nan
            else:
                value = value + (model[0].weight[0, 0] - model[0].weight[0, 0].detach()).abs().sqrt()
        loss.calls += 1  # type: ignore[attr-defined]
        return value

    loss.calls = 0  # type: ignore[attr-defined]
    kept: list[Tensor] = []
    with pytest.raises(SecateurError, match=f"the {where}.* is (nan|inf) at step 2"):
        fit(
            model,
            pairs(),
            steps=5,
            loss=loss,
            after_step=[lambda s: kept.append(s.model[0].weight.detach().clone())],
        )
    assert torch.equal(model[0].weight, kept[1])


def test_killed_and_resumed_gives_the_same_bits(tmp_path: Path) -> None:
    here = Path(__file__)
    file = tmp_path / "run.safetensors"
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(here.parent), str(file)],
        check=False,
        cwd=here.parents[2],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == -signal.SIGKILL
    with safe_open(file, "pt") as opened:
        assert json.loads(opened.metadata()["secateur"])["step"] == 6
    steps: list[int] = []
    resumed = train(file, lambda state: steps.append(state.step))
    straight = train(None)
    assert steps == [6, 7, 8, 9, 10, 11] and len(straight["losses"]) == 12
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)


def test_checkpoints_are_counted_from_the_first_step_of_a_part(tmp_path: Path) -> None:
    file, seen = tmp_path / "run.safetensors", []
    look = lambda state: seen.append(file.exists())
    fit(net(), pairs(), steps=10, start=3, until=8, after_step=[look], checkpoint=file, every=4)
    assert seen == [False, False, False, False, True]  # before steps 4 to 7, and after step 7 was written


def test_checkpoint_of_other_settings_or_damaged_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "run.safetensors"
    fit(net(), pairs(), steps=4, checkpoint=file, every=2)
    finished = net()
    assert (
        len(fit(finished, pairs(), steps=4, checkpoint=file, every=2)) == 4
    )  # done: nothing is trained again
    with pytest.raises(SecateurError, match="another lr"):
        fit(net(), pairs(), steps=4, lr=0.5, checkpoint=file)
    with pytest.raises(SecateurError, match="another data"):
        fit(net(), pairs(41), steps=4, checkpoint=file)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(SecateurError, match="isn't a checkpoint"):
        fit(net(), pairs(), steps=4, checkpoint=file)


def test_next_token_loss_against_transformers(tiny_llama: Any) -> None:
    model = tiny_llama()
    ids = torch.randint(0, 64, (2, 9))
    with torch.no_grad():
        expected = model(ids, labels=ids).loss
        torch.testing.assert_close(default_loss(model, ids), expected)
        torch.testing.assert_close(default_loss(model, {"input_ids": ids, "labels": ids}), expected)
        torch.testing.assert_close(default_loss(model, {"input_ids": ids}), expected)


def test_padding_does_not_count() -> None:
    logits = torch.randn(1, 5, 7)
    ids = torch.tensor([[0, 0, 3, 4, 5]])
    mask = torch.tensor([[0, 0, 1, 1, 1]])
    expected = F.cross_entropy(logits[0, 2:4], torch.tensor([4, 5]))
    torch.testing.assert_close(next_token_loss(logits, ids, mask), expected)


def test_bfloat16_autocast_keeps_float32_weights() -> None:
    seen: set[torch.dtype] = set()
    model = net()
    model[0].register_forward_hook(lambda module, args, out: seen.add(out.dtype))
    losses = fit(model, pairs(), steps=3, precision="bfloat16")
    assert seen == {torch.bfloat16} and {p.dtype for p in model.parameters()} == {torch.float32}
    assert losses != fit(net(), pairs(), steps=3, precision="float32")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps"),
        ({"lr": -1.0}, "learning rate"),
        ({"batch": 0}, "batch"),
        ({"warmup": 1.5}, "warmup"),
        ({"precision": "int8"}, "precision"),
        ({"data": torch.empty(0, 6)}, "no samples"),
        ({"data": (torch.rand(3, 6), torch.zeros(4, dtype=torch.long))}, r"\[3, 4\] samples"),
        ({"data": []}, "no samples"),
        ({"data": {"x": torch.rand(3, 6)}}, "unexpected keyword|gives no loss"),
    ],
)
def test_nonsense_is_refused(change: dict[str, Any], message: str) -> None:
    arguments = {"data": pairs(), "steps": 1} | change
    with pytest.raises((SecateurError, TypeError), match=message):
        fit(net(), **arguments)


def test_nothing_to_train_is_an_error() -> None:
    with pytest.raises(SecateurError, match="requires a gradient"):
        fit(net().requires_grad_(False), pairs(), steps=1)
