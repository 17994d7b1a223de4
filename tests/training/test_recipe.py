"""Optimisers and schedules, by hand; parts of a run; hooks that keep state; labels and NaN named."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from secateur.errors import SecateurError
from secateur.training import Recipe, State, fit
from secateur.training.batches import check_classes
from secateur.training.checkpoint import copy_moments

SGD: dict[str, Any] = {"optimizer": "sgd", "lr": 0.1, "warmup": 0.0, "clip": 0.0, "batch": 10}


def pairs(count: int = 40) -> tuple[Tensor, Tensor]:
    x = torch.randn(count, 6, generator=torch.Generator().manual_seed(1))
    return x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long()


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Dropout(0.2), nn.ReLU(), nn.Linear(16, 3))


def same(first: nn.Module, second: nn.Module) -> bool:
    a, b = first.state_dict(), second.state_dict()
    return all(torch.equal(a[name], b[name]) for name in a)


def test_schedules() -> None:
    drops = Recipe(lr=0.1, lr_schedule="milestones", milestones=(0.5, 0.75), warmup=0.0)
    assert [drops.rate(step, 8) for step in range(8)] == pytest.approx([0.1] * 4 + [0.01] * 2 + [0.001] * 2)
    slow = Recipe(lr=1.0, lr_schedule="milestones", milestones=(0.25,), warmup=0.5)
    assert [slow.rate(step, 8) for step in range(5)] == pytest.approx([0.25, 0.5, 0.075, 0.1, 0.1])
    line = Recipe(lr=1.0, lr_schedule="linear", warmup=0.2)
    assert [line.rate(step, 10) for step in (0, 1, 2, 6, 9)] == pytest.approx([0.5, 1, 1, 0.5, 0.125])
    assert Recipe(lr=0.3, lr_schedule="constant", warmup=0.0).rate(99, 100) == 0.3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optimizer": "lion"}, "sgd, adam, adamw"),
        ({"lr_schedule": "steps"}, "milestones"),
        ({"momentum": -1}, "below 0"),
        ({"decay": "some"}, "matrices"),
        ({"milestone": (0.5,)}, "did you mean milestones"),
    ],
)
def test_a_recipe_that_can_t_be_meant(change: dict[str, Any], message: str) -> None:
    with pytest.raises(SecateurError, match=message):
        Recipe().replace(**change)


def test_lists_of_a_file_are_the_same_recipe() -> None:
    listed: Any = {"betas": [0.8, 0.9], "milestones": [0.1]}
    assert Recipe(**listed) == Recipe(betas=(0.8, 0.9), milestones=(0.1,))


def test_sgd_with_nesterov_and_decay_by_hand() -> None:
    """The first Nesterov step of torch's SGD moves by lr * (1 + momentum) * (g + decay * w)."""
    model = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(2.0)
    settings = {**SGD, "batch": 1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.5}
    fit(
        model, torch.ones(1, 1), steps=1, loss=lambda m, x: 3 * m(x).sum(), lr_schedule="constant", **settings
    )
    assert model.weight.item() == pytest.approx(2.0 - 0.1 * 1.9 * (3 + 0.5 * 2))


def test_decay_of_all_tensors_or_of_matrices() -> None:
    moved = {}
    for decay in ("all", "matrices"):
        model = nn.Linear(1, 1)
        with torch.no_grad():
            model.weight.fill_(1.0)
            model.bias.fill_(1.0)
        settings = {**SGD, "batch": 1, "weight_decay": 0.5, "decay": decay, "lr_schedule": "constant"}
        fit(model, torch.zeros(1, 1), steps=1, loss=lambda m, x: 0 * m(x).sum(), **settings)
        moved[decay] = (model.weight.item(), model.bias.item())
    assert moved["all"] == pytest.approx((0.95, 0.95)) and moved["matrices"] == pytest.approx((0.95, 1.0))


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_run_in_two_parts_is_the_run(momentum: float) -> None:
    """Spec lottery-rewinding (b): exact with the optimiser's state, or without momentum; otherwise not."""
    settings = {**SGD, "momentum": momentum, "steps": 12}
    whole, parted, fresh = net(), net(), net()
    rates: list[float] = []
    losses = fit(whole, pairs(), **settings)
    kept: list[Any] = []
    early = fit(parted, pairs(), until=5, at_end=lambda s: kept.append(copy_moments(s.optimizer)), **settings)
    fresh.load_state_dict(parted.state_dict())
    late = fit(
        parted,
        pairs(),
        start=5,
        moments=kept[0],
        after_step=[lambda s: rates.append(s.optimizer.param_groups[0]["lr"])],
        **settings,
    )
    assert early + late == losses and same(parted, whole)
    assert len(rates) == 7 and rates[0] == Recipe(**SGD).rate(5, 12)
    fit(fresh, pairs(), start=5, **settings)
    assert same(fresh, whole) == (momentum == 0)


class Counter:
    """A hook with a memory: every third step it turns the sign of a bias."""

    def __init__(self) -> None:
        self.count, self.total = 0, torch.zeros(3)

    def __call__(self, state: State) -> None:
        self.count += 1
        self.total += state.model[4].bias.detach()
        if self.count % 3 == 0:
            with torch.no_grad():
                state.model[4].bias.neg_()

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "total": self.total}

    def load_state_dict(self, values: dict[str, Any]) -> None:
        self.count, self.total = values["count"], values["total"]


def test_hooks_and_augmentation_resume_to_the_bit(tmp_path: Path) -> None:
    def shake(batch: Any, generator: torch.Generator) -> Any:
        return batch[0] + 0.1 * torch.randn(batch[0].shape, generator=generator), batch[1]

    class Stop(Exception):
        pass

    def stop(state: State) -> None:
        if state.step == 8:
            raise Stop

    settings = {**SGD, "steps": 14, "augment": shake, "every": 2}
    straight, first, again = net(), net(), net()
    counter, other = Counter(), Counter()
    losses = fit(straight, pairs(), after_step=[counter], **settings)
    file = tmp_path / "run.safetensors"
    with pytest.raises(Stop):
        fit(first, pairs(), after_step=[Counter()], after_backward=[stop], checkpoint=file, **settings)
    assert fit(again, pairs(), after_step=[other], checkpoint=file, **settings) == losses
    assert same(again, straight) and other.count == counter.count and torch.equal(other.total, counter.total)


def test_a_checkpoint_of_another_model_is_refused_and_kept(tmp_path: Path) -> None:
    file = tmp_path / "run.safetensors"
    fit(net(), pairs(), steps=2, checkpoint=file, **SGD)
    content = file.read_bytes()
    other = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3))
    before = other[0].weight.detach().clone()
    with pytest.raises(SecateurError, match="checkpoint of another model"):
        fit(other, pairs(), steps=2, checkpoint=file, **SGD)
    with pytest.raises(SecateurError, match="another momentum"):
        fit(net(), pairs(), steps=2, checkpoint=file, **{**SGD, "momentum": 0.5})
    assert torch.equal(other[0].weight, before) and file.read_bytes() == content
    for cut in (10, len(content) // 2, len(content) - 1):
        file.write_bytes(content[:cut])
        with pytest.raises(SecateurError, match="cut short"):
            fit(net(), pairs(), steps=2, checkpoint=file, **SGD)


def test_labels_without_an_output_and_classes_without_a_sample() -> None:
    x, y = pairs()
    model = net()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    for wrong in (y + 1, y - 1):
        with pytest.raises(SecateurError, match=r"labels reach from -?\d to \d, the model has 3 classes"):
            fit(model, (x, wrong), steps=1, **SGD)
    assert all(torch.equal(t, before[n]) for n, t in model.named_parameters())
    check_classes(y, 3)
    with pytest.raises(SecateurError, match="no sample of class 3, 4"):
        check_classes(y, 5)
    with pytest.raises(SecateurError, match="reach from 0 to 2 in 2 classes"):
        check_classes(y, 2)


def test_nan_names_the_layer_and_keeps_the_last_good_state(tmp_path: Path) -> None:
    x, y = pairs()
    model, file = net(), tmp_path / "run.safetensors"
    seen: list[dict[str, Tensor]] = []

    def burst(state: State) -> None:
        seen.append({name: t.clone() for name, t in state.model.state_dict().items()})

    class Break(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x / 0 if len(seen) == 5 else x

    model.insert(3, Break())
    with pytest.raises(SecateurError, match=r"the loss is nan at step 5, first in 3;") as caught:
        fit(model, (x, y), steps=9, after_step=[burst], checkpoint=file, every=2, **SGD)
    assert str(file) in str(caught.value)
    last = seen[-1]
    assert all(torch.equal(t, last[n]) for n, t in model.state_dict().items() if t.is_floating_point())
    again = net().insert(3, nn.Identity())
    taken: list[int] = []
    fit(again, (x, y), steps=9, after_step=[lambda s: taken.append(s.step)], checkpoint=file, every=2, **SGD)
    assert taken == [4, 5, 6, 7, 8]  # from the last good checkpoint


def test_nan_in_a_gradient_names_the_layer_nearest_to_the_output() -> None:
    class Root(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.sqrt()  # its slope at 0 is infinite

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), Root(), nn.Linear(4, 3))
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].bias.zero_()
    with pytest.raises(
        SecateurError, match=r"gradient's norm is (nan|inf) at step 0, first in 0\.(bias|weight)"
    ):
        fit(model, pairs(), steps=1, **SGD)


def test_one_number_that_breaks_is_enough() -> None:
    class Break(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.where(torch.arange(x.shape[1]) == 1, x / 0, x)

    with pytest.raises(SecateurError, match="first in 1 *;|first in 1$"):
        fit(nn.Sequential(nn.Linear(6, 4), Break(), nn.Linear(4, 3)), pairs(), steps=1, **SGD)


def test_nan_in_the_data_is_named() -> None:
    x, y = pairs()
    x[:, 2] = math.nan
    with pytest.raises(SecateurError, match="first in the input of 0"):
        fit(net(), (x, y), steps=1, **SGD)
