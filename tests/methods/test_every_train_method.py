"""The common checks of methods that prune while they train: what each owes its user, unasked."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import secateur
from secateur import SecateurError
from secateur.method import method_class
from secateur.training import Task, fit
from secateur.training.losses import default_loss
from secateur.training.masks import Masked, shuffled
from secateur.training.method import TrainMethod

EVERY = [m for m in secateur.list_methods() if issubclass(method_class(m), TrainMethod)]
TRAINED = [m for m in EVERY if not method_class(m).draws and method_class(m).removes != "work"]
"""Those that draw in steps, and those that skip work while the network runs, have these checks in a test file of their own."""
WEIGHTS = [m for m in TRAINED if method_class(m).removes == "weights"]
UNITS = [m for m in TRAINED if method_class(m).removes == "units"]
QUICK: dict[str, dict] = {
    "lottery-ticket": {"rounds": 2},
    "lottery-rewinding": {"rounds": 2, "rewind": "2it"},
    "pagcp": dict(method_class("pagcp").quick),
    "metapruning": dict(method_class("metapruning").quick),
}
"""Settings that keep a check short; the defaults are for real runs."""


class Net(nn.Module):
    """A convolution, a norm, and two linear layers, for 1 x 8 x 8 pictures and 4 classes."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.hidden = nn.Linear(128, 16)
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        return self.head(torch.relu(self.hidden(torch.relu(self.norm(self.conv(x))).flatten(1))))


def digits(count=96):
    """Four noisy patterns."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(count) % 4
    patterns = torch.randn(4, 1, 8, 8, generator=generator)
    return patterns[labels] + torch.randn(count, 1, 8, 8, generator=generator), labels


def net():
    torch.manual_seed(0)
    return Net()


def run(method, target="50%", model=None, **settings):
    settings = {"data": digits(), "steps": 12, "batch": 16, **QUICK.get(method, {}), **settings}
    return secateur.train_prune(model or net(), method=method, target=target, **settings)


def state(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def prunable(model):
    return [model.conv.weight, model.hidden.weight, model.head.weight]


@pytest.mark.parametrize("method", TRAINED)
def test_the_budget_is_met_exactly_and_never_exceeded(method):
    for share in (0.75, 0.3):
        pruned = run(method, f"{share:.0%}")
        assert pruned.report["met"] is True
        if method in WEIGHTS:
            sizes = [weight.numel() for weight in prunable(net())]
            kept = sum(int(mask.sum()) for mask in pruned.plan.masks.values())
            assert sum(int((weight != 0).sum()) for weight in prunable(pruned.model)) == kept
            spare = 0 if method.startswith("lottery") else len(sizes)  # a sheet may round in each layer
            assert int(share * sum(sizes)) - spare <= kept <= int(share * sum(sizes))
        else:
            groups = [g for g in pruned.report["groups"] if g["reason"] is None]
            assert groups
            if method_class(method).allocation != "global":
                assert all(share * g["size"] - 1 < g["kept"] <= max(1, share * g["size"]) for g in groups)


@pytest.mark.parametrize("method", TRAINED)
def test_everything_kept_removes_nothing(method):
    pruned = run(method, "100%")
    assert pruned.report["met"] and not pruned.plan.keep
    assert all(mask.all() for mask in pruned.plan.masks.values())
    assert pruned.report["after"]["params"] == pruned.report["before"]["params"]
    assert all(weight.all() for weight in prunable(pruned.model))


@pytest.mark.parametrize("method", TRAINED)
def test_the_input_model_is_untouched_and_the_seed_decides(method):
    model = net()
    before, random = state(model), torch.get_rng_state()
    first = run(method, model=model, seed=3)
    assert torch.equal(torch.get_rng_state(), random)
    torch.rand(5)
    second, third = run(method, model=model, seed=3), run(method, model=model, seed=4)
    assert equal(state(model), before)
    assert first.plan == second.plan and equal(state(first.model), state(second.model))
    assert not equal(state(first.model), state(third.model))


@pytest.mark.parametrize("method", TRAINED)
def test_a_plan_saved_loaded_and_applied_to_a_fresh_model_gives_equal_tensors(method, tmp_path):
    pruned = run(method)
    pruned.plan.save(tmp_path)
    plan = secateur.Plan.load(tmp_path)
    assert plan == pruned.plan
    torch.manual_seed(9)
    fresh = Net()
    secateur.apply_plan(fresh, plan)
    assert equal(state(fresh), state(pruned.model))
    x = digits()[0][:4]
    with torch.no_grad():
        assert torch.equal(fresh.eval()(x), pruned.model.eval()(x))


@pytest.mark.parametrize("method", TRAINED)
def test_a_run_that_was_stopped_goes_on_to_the_same_bits(method, tmp_path):
    """Stopped at a step that no checkpoint falls on, in the middle of each third of the whole run."""
    calls = []

    def loss(model, batch):
        calls.append(1)
        if len(calls) in stops:
            raise KeyboardInterrupt
        return default_loss(model, batch)

    stops = set()
    whole = run(method, loss=loss)
    count = len(calls)
    stops = {count // 6, count // 2, 5 * count // 6 + 1}
    calls.clear()
    folder = tmp_path / "run"
    for _ in stops:
        with pytest.raises(KeyboardInterrupt):
            run(method, loss=loss, resume=folder, every=3)
    resumed = run(method, loss=loss, resume=folder, every=3)
    # each time at most two whole steps and a part of one; a step of tas has two losses, one of a metanetwork six, and pagcp tries
    # the cut again that was stopped
    losses = 2 if method in ("tas", "metapruning", "pagcp") else 1
    assert len(calls) <= count + 3 * 3 * losses and not folder.exists()
    assert equal(state(resumed.model), state(whole.model)) and resumed.plan == whole.plan
    assert [row.get("loss") for row in resumed.report["phases"]] == [
        row.get("loss") for row in whole.report["phases"]
    ]


@pytest.mark.parametrize("method", TRAINED)
def test_bfloat16_and_training_mode_are_kept(method):
    x, y = digits()
    pruned = run(method, model=net().to(torch.bfloat16), data=(x.bfloat16(), y))
    assert {p.dtype for p in pruned.model.parameters()} == {torch.bfloat16} and pruned.model.training
    with torch.no_grad():
        assert torch.isfinite(pruned.model(x[:4].bfloat16())).all()


@pytest.mark.parametrize("method", TRAINED)
def test_nonsense_raises_one_named_error_and_leaves_the_model_alone(method, tmp_path):
    model = net()
    before = state(model)
    x, y = digits()

    def refuse(match, candidate=model, **settings):
        with pytest.raises(SecateurError, match=match):
            run(method, **{"model": candidate, **settings})

    refuse("outside 0..1", target=1.5)
    refuse("can't be read", target="half")
    refuse("no hyperparameter", shrubbery=3)
    refuse("isn't a learning rate", lr=-1.0)
    refuse("no data", data=None)
    refuse("no samples", data=(x[:0], y[:0]))
    refuse("labels reach from 1 to 4, the model has 4 classes", data=(x, y + 1))
    refuse("is no training", steps=0)
    refuse("both epochs and steps", epochs=1)
    with pytest.raises(SecateurError, match="use secateur.train_prune"):
        secateur.prune(model, x[:1], method=method, target="50%")
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.hidden.weight[0, 0] = float("nan")
    refuse("NaN", candidate=broken)
    assert equal(state(model), before)
    task = Task("patterns", Net, (x, torch.where(y == 2, 1, y)), classes=4)
    with pytest.raises(SecateurError, match="no sample of class 2"):
        secateur.train_prune(task, method=method, target="50%", steps=2)


@pytest.mark.parametrize("method", ["lottery-ticket"])
def test_the_folder_of_another_run_is_refused_and_kept(method, tmp_path):
    folder = tmp_path / "run"

    def stop(model, batch):
        if len(list(folder.glob("*.safetensors"))) > 1:
            raise KeyboardInterrupt
        return default_loss(model, batch)

    with pytest.raises(KeyboardInterrupt):
        run(method, loss=stop, resume=folder, every=3)
    files = {path: path.read_bytes() for path in folder.iterdir()}
    for change, named in (({"lr": 0.5}, "lr"), ({"target": "40%"}, "target"), ({"seed": 1}, "seed")):
        with pytest.raises(SecateurError, match=f"begun with another {named}"):
            run(method, resume=folder, **change)
    with pytest.raises(SecateurError, match="another network"):
        run(method, model=Net(), resume=folder)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("x")
    with pytest.raises(SecateurError, match="holds no run"):
        run(method, resume=tmp_path / "full")
    assert {path: path.read_bytes() for path in folder.iterdir()} == files
    last = max(files, key=lambda path: path.name if path.suffix == ".safetensors" else "")
    last.write_bytes(files[last][:200])
    with pytest.raises(SecateurError, match="cut short"):
        run(method, resume=folder, every=3)


def test_saved_models_load_where_secateur_cannot_be_imported(tmp_path):
    x = digits()[0][:4]
    torch.save(x, tmp_path / "x.pt")
    for method in TRAINED:
        pruned = run(method)
        pruned.save(tmp_path / method)
        with torch.no_grad():
            torch.save(pruned.model.eval()(x), tmp_path / f"{method}.pt")
    here = str(Path(__file__).parent)
    script = (
        "import importlib.util, sys, types, torch\n"
        "class Blocked:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] == 'secateur': raise ImportError(name)\n"
        "sys.meta_path.insert(0, Blocked())\n"
        f"folder, methods = {str(tmp_path)!r}, {TRAINED!r}\n"
        f"source = open({here + '/test_every_train_method.py'!r}).read()\n"
        "names = {'nn': torch.nn, 'torch': torch}\n"
        "exec(source[source.index('class Net'):source.index('def digits')], names)\n"
        "x = torch.load(folder + '/x.pt', weights_only=True)\n"
        "for method in methods:\n"
        "    spec = importlib.util.spec_from_file_location('load_pruned', f'{folder}/{method}/load_pruned.py')\n"
        "    module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module)\n"
        "    found = module.load(names['Net']()).eval()(x)\n"
        "    expected = torch.load(f'{folder}/{method}.pt', weights_only=True)\n"
        "    assert torch.allclose(found, expected, atol=1e-6), method\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


@pytest.fixture(scope="module")
def real():
    """scikit-learn's handwritten digits, and a network without convolutions: a training takes a second."""
    pytest.importorskip("sklearn")
    from secateur.data.digits import load_digits
    from secateur.measure.vision import accuracy

    def build():
        return nn.Sequential(
            nn.Flatten(), nn.Linear(64, 48), nn.BatchNorm1d(48), nn.ReLU(), nn.Linear(48, 10)
        )

    held_out = load_digits("test")
    train = load_digits("train")
    return Task("digits", build, train, lambda m: accuracy(m, *held_out), inputs=train[0][:2], classes=10)


@pytest.mark.parametrize("method", WEIGHTS)
def test_better_than_a_random_mask_trained_as_long(real, method):
    recipe = {"optimizer": "sgd", "lr": 0.1, "batch": 32, "warmup": 0.0, "clip": 0.0}
    found, by_chance = [], []
    for seed in range(3):
        pruned = secateur.train_prune(
            real, method=method, target="6%", steps=100, seed=seed, **{**QUICK.get(method, {}), **recipe}
        )
        found.append(pruned.report["after"]["quality"])
        torch.manual_seed(seed)
        control = real.build()
        masks = shuffled(pruned.plan.masks, torch.Generator().manual_seed(seed))
        steps = max(row["last_step"] for row in pruned.report["phases"])
        fit(control, real.train, steps=steps, seed=seed, after_step=[Masked(control, masks)], **recipe)
        by_chance.append(real.quality(control))
    assert sum(found) / 3 > sum(by_chance) / 3 + 0.02


@pytest.mark.parametrize("method", TRAINED)
def test_the_record_and_the_docstring_name_their_source(method):
    cls = method_class(method)
    assert cls.info.name == method and cls.info.title and cls.info.spec
    doc = (sys.modules[cls.__module__].__doc__ or "") + (cls.__doc__ or "")
    assert "arXiv" in doc or "arxiv" in doc
    assert "Spec:" in doc
