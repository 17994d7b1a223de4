"""TAS: the loss of its sheet, what the search drives sizes to, and runs that are stopped inside the search."""

import copy

import pytest
import torch
from torch import nn

import secateur
from secateur import SecateurError
from secateur.gates import Choice, place, width_choices
from secateur.graph import trace
from secateur.method import make_method
from secateur.training import Recipe, fit
from secateur.training.distill import distillation
from secateur.training.losses import default_loss
from secateur.training.second import Second, halves


class Residual(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x):
        return torch.relu(x + self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))


class Net(nn.Module):
    """A stem and three residual blocks on 1 x 4 x 4 pictures, 4 classes."""

    def __init__(self, width=8):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.blocks = nn.Sequential(*(Residual(width) for _ in range(3)))
        self.head = nn.Linear(width, 4)

    def forward(self, x):
        return self.head(self.blocks(torch.relu(self.norm(self.stem(x)))).mean((2, 3)))


def patterns(count=64):
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(count) % 4
    means = torch.randn(4, 1, 4, 4, generator=generator)
    return means[labels] + torch.randn(count, 1, 4, 4, generator=generator), labels


def run(target="macs<=50%", steps=12, **settings):
    torch.manual_seed(0)
    settings = {"lr": 0.05, "batch": 16, "optimizer": "sgd", "shape_lr": 0.05, "data": patterns(), **settings}
    return secateur.train_prune(Net(), method="tas", target=target, steps=steps, **settings)


def state(model):
    return [tensor.clone() for tensor in model.state_dict().values()]


class Says(nn.Module):
    def __init__(self, *logits):
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits))

    def forward(self, x):
        return self.logits.expand(len(x), -1)


def test_the_sheets_distillation():
    method = make_method("tas")
    student, teacher = Says(2.0, 0.0), Says(0.0, 1.0)
    batch = torch.zeros(3, 1), torch.zeros(3, dtype=torch.int64)
    assert default_loss(student, batch).item() == pytest.approx(0.126928, abs=1e-6)
    loss = distillation(teacher, weight=method.distil, temperature=method.soften)
    assert loss(student, batch).item() == pytest.approx(1.017380, abs=1e-6)


def test_a_loss_of_the_tasks_own_is_distilled_as_much():
    found = []

    def own(model, batch):
        found.append(1)
        return default_loss(model, batch)

    with_own, plain = run(loss=own), run()
    assert len(found) == 3 * 12  # twice in the search, once at the end
    losses = [p.report["phases"][-1]["loss"] for p in (with_own, plain)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_sizes_fit_the_budget_and_are_the_first_units():
    pruned = run()
    after, before = (pruned.report[when]["macs"] for when in ("after", "before"))
    assert pruned.report["met"] and 0.4 * before < after <= 0.5 * before
    for name, units in pruned.plan.keep.items():
        assert units.tolist() == list(range(len(units))), name
    assert [row["phase"] for row in pruned.report["phases"]] == ["search", "small"]


def test_no_weight_is_inherited():
    """The same data in another order of weights: the dense network's weights are only a teacher's."""
    torch.manual_seed(0)
    net = Net()
    pruned = secateur.train_prune(
        net, method="tas", target="100%", data=patterns(), steps=1, lr=1e-9, batch=16, optimizer="sgd"
    )
    assert not pruned.plan.keep
    assert not torch.allclose(pruned.model.stem.weight, net.stem.weight, atol=1e-3)


@pytest.mark.parametrize(("target", "low", "high"), [("macs<=45%", 0.30, 0.5), ("macs<=80%", 0.65, 0.85)])
def test_the_search_seeks_the_target(target, low, high):
    """Cost alone moves the sizes: the likeliest ones end near the target, from above and from below."""
    row = run(target, steps=40, shape_lr=0.1, cost=20.0).report["phases"][0]
    assert low <= row["share_of_the_likeliest"] <= high


def test_the_published_choice_is_the_likeliest_whatever_it_costs():
    pruned = run(select="argmax", steps=6)
    sizes = {len(units) for name, units in pruned.plan.keep.items() if name.endswith("channels")}
    assert sizes <= set(width_choices(8))
    share = pruned.report["phases"][0]["share_of_the_likeliest"]
    assert pruned.report["after"]["macs"] / pruned.report["before"]["macs"] == pytest.approx(share, rel=1e-4)


@pytest.mark.parametrize("step", [4, 9])
def test_a_run_that_was_stopped_in_the_search_ends_with_the_same_bits(step, tmp_path):
    calls = []

    def loss(model, batch):
        calls.append(1)
        if len(calls) == stop:
            raise KeyboardInterrupt
        return default_loss(model, batch)

    stop = -1
    whole = run(loss=loss)
    calls.clear()
    stop = 2 * step  # the second optimiser's turn
    with pytest.raises(KeyboardInterrupt):
        run(loss=loss, resume=tmp_path / "run", every=3)
    resumed = run(loss=loss, resume=tmp_path / "run", every=3)
    assert resumed.plan == whole.plan and len(calls) < 3 * 12 + 2 * 4
    assert all(torch.equal(a, b) for a, b in zip(state(whole.model), state(resumed.model), strict=True))
    assert whole.report["phases"][0] == resumed.report["phases"][0]


def test_a_resumed_run_with_other_sizes_is_refused(tmp_path):
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 4))
    graph = trace(model, patterns()[0])
    recipe = Recipe(optimizer="sgd", lr=0.1, batch=16)

    def search(counts, stop):
        gated = place(copy.deepcopy(model), graph, lambda g: Choice(8, counts), kinds=("channels",))
        sizes = [law.logits for law in gated.choices().values()]
        upper = Second(gated, sizes, data=patterns(), loss=default_loss, recipe=recipe)
        settings = {"parameters": [*gated.model.parameters()], "after_step": [upper], "until": stop}
        fit(gated, patterns(), steps=4, checkpoint=tmp_path / "x.safetensors", recipe=recipe, **settings)

    search((4, 8), 4)
    search((4, 8), 4)
    with pytest.raises(SecateurError, match="trained other parameters|of another model"):
        search((2, 4, 8), 4)


def test_halves_are_all_samples_once():
    first, second = halves(
        {"x": torch.arange(7), "y": 10 * torch.arange(7)}, torch.Generator().manual_seed(0)
    )
    assert sorted([*first["x"].tolist(), *second["x"].tolist()]) == list(range(7))
    assert torch.equal(first["y"], 10 * first["x"]) and len(second["y"]) == 4
    one, two = halves(["a", "b"], torch.Generator().manual_seed(0))
    assert sorted(one + two) == ["a", "b"]
    with pytest.raises(SecateurError, match="no halves"):
        halves(torch.zeros(1, 2), torch.Generator())


@pytest.mark.parametrize(
    "bad", [{"tau": 0.0}, {"tau_end": -1.0}, {"tolerance": -0.1}, {"distil": 2.0}, {"select": "best"}]
)
def test_settings_out_of_range_are_refused(bad):
    with pytest.raises(SecateurError, match=next(iter(bad))):
        make_method("tas", **bad)


def test_a_rate_that_breaks_the_search_is_named():
    with pytest.raises(SecateurError, match="isn't finite|isn't a number|is nan"):
        run(lr=1e6, clip=0.0, distil=0.0)
