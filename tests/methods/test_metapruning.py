"""MetaPruning: the phases around the metanetwork, making one, and what is refused."""

import json

import pytest
import torch
from torch import nn

import secateur
from secateur import SecateurError
from secateur.cli.main import main
from secateur.graph import trace
from secateur.methods.metapruning import Metapruning
from secateur.pruning.target import parse_target
from secateur.training import Task
from secateur.training.job import Job
from secateur.training.metanetwork import load_metanetwork, save_metanetwork, tensors_of
from secateur.training.metatraining import Making, cut_by, train_metanetwork
from secateur.training.recipe import Recipe

MAKING = {"models": 2, "meta_epochs": 2, "hidden": 8, "layers": 1}


class Net(nn.Module):
    """Two convolutions with norms, for 1 x 8 x 8 pictures and 4 classes."""

    def __init__(self, last=12):
        super().__init__()
        self.one, self.norm1 = nn.Conv2d(1, 10, 3, padding=1), nn.BatchNorm2d(10)
        self.two, self.norm2 = nn.Conv2d(10, last, 3, stride=2), nn.BatchNorm2d(last)
        self.head = nn.Linear(last, 4)

    def forward(self, x):
        x = torch.relu(self.norm1(self.one(x)))
        return self.head(torch.relu(self.norm2(self.two(x))).mean((2, 3)))


def pictures(count=64):
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(count) % 4
    patterns = torch.randn(4, 1, 8, 8, generator=generator)
    return patterns[labels] + torch.randn(count, 1, 8, 8, generator=generator), labels


def task():
    x = pictures()
    return Task("patterns", Net, x, inputs=x[0][:2], recipe=Recipe(lr=1e-2, batch=16), classes=4)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A metanetwork for the task, and how it was made."""
    folder = tmp_path_factory.mktemp("meta") / "net"
    meta, about = train_metanetwork(task(), Making(**MAKING), steps=6)
    save_metanetwork(meta, folder, about)
    return folder, about


def test_making_one_trains_data_models_and_takes_the_best_epoch(made):
    folder, about = made
    phases = {row["phase"]: row for row in about["phases"]}
    assert list(phases) == [
        *("data-0", "data-0-ready", "data-1", "data-1-ready", "metanetwork"),
        *("epoch-1", "epoch 1", "epoch-2", "epoch 2"),
    ]
    # one data model to learn from, the other to judge by: two epochs of one step
    assert phases["metanetwork"]["last_step"] == 2
    losses = {n: phases[f"epoch {n}"]["loss_after_the_cut"] for n in (1, 2)}
    assert all(0 < value < 100 for value in losses.values()) and losses[1] != losses[2]
    assert load_metanetwork(folder).form["kernels"] == [
        ["one.weight", 9],
        ["two.weight", 9],
        ["head.weight", 1],
    ]
    assert json.loads((folder / "metanetwork.json").read_text())["about"]["models"] == 2


def test_a_run_takes_it_and_meets_the_budget_exactly(made):
    folder, _ = made
    pruned = secateur.train_prune(
        task(), method="metapruning", metanetwork=str(folder), target="macs<=40%", steps=6
    )
    report = pruned.report
    assert [row["phase"] for row in report["phases"]] == ["dense", "ready", "changed", "tune"]
    assert "quality_after_the_cut" in report["phases"][2]
    dense, limit = report["before"]["macs"], 0.4 * report["before"]["macs"]
    graph = trace(Net(), torch.zeros(2, 1, 8, 8))
    assert report["met"] and report["after"]["macs"] <= limit
    for name, kept in pruned.plan.keep.items():  # one more unit anywhere would be over it
        more = torch.arange(min(len(kept) + 1, graph[name].size))
        assert graph.macs({**pruned.plan.keep, name: more}) > limit
    assert dense > report["after"]["macs"]


def test_what_leaves_in_the_first_cut_is_not_among_what_stays(made):
    folder, _ = made
    seen = {}

    class Watched(Metapruning):
        def put_back(self, job, context, small, keep):
            super().put_back(job, context, small, keep)
            seen["keep"] = keep
            x = pictures()[0]
            small.eval(), job.model.eval()
            with torch.no_grad():
                assert torch.allclose(
                    small(x), job.model(x), atol=1e-5
                )  # the same network at the dense shape

    pruned = secateur.train_prune(
        task(), method=Watched(metanetwork=str(folder)), target="macs<=40%", steps=6
    )
    assert seen["keep"]
    for name, units in pruned.plan.keep.items():
        if name in seen["keep"]:
            assert set(units.tolist()) <= set(seen["keep"][name].tolist())


def test_the_metanetwork_changes_the_network_that_is_tuned(made):
    folder, _ = made
    meta = load_metanetwork(folder)
    job = Job(
        Net(), task(), Metapruning(), parse_target("macs<=40%"), 6, task().recipe, inputs=pictures()[0][:2]
    )
    before = {name: t.clone() for name, t in tensors_of(job.model).items()}
    Metapruning().change(job, job.model, meta)
    changed = {name for name, t in tensors_of(job.model).items() if not torch.equal(t, before[name])}
    assert changed == {name for name, _ in job.model.named_parameters()}


def test_a_cut_that_keeps_more_than_the_first_has_none(made):
    folder, _ = made
    pruned = secateur.train_prune(
        task(), method="metapruning", metanetwork=str(folder), target="macs<=90%", steps=4
    )
    assert (
        pruned.report["met"] and 0.8 < pruned.report["after"]["macs"] / pruned.report["before"]["macs"] <= 0.9
    )


def test_making_one_goes_on_after_a_kill_to_the_same_bits(tmp_path):
    calls, stops = [], set()

    def loss(model, batch):
        calls.append(1)
        if len(calls) in stops:
            raise KeyboardInterrupt
        return torch.nn.functional.cross_entropy(model(batch[0]), batch[1])

    def make(folder=None):
        own = task()
        own.loss = loss
        return train_metanetwork(own, Making(**MAKING), steps=4, directory=folder, every=2)

    whole, about = make()
    count = len(calls)
    stops = {count // 4, count // 2, 3 * count // 4}
    calls.clear()
    for _ in stops:
        with pytest.raises(KeyboardInterrupt):
            make(tmp_path / "run")
    again, other = make(tmp_path / "run")
    assert all(
        torch.equal(a, b)
        for a, b in zip(whole.state_dict().values(), again.state_dict().values(), strict=True)
    )
    assert other["phases"] == about["phases"] and len(calls) <= count + 3 * 6
    with pytest.raises(SecateurError, match="begun with another seed"):
        train_metanetwork(task(), Making(**MAKING), steps=4, seed=1, directory=tmp_path / "run")


def test_cut_by_a_factor():
    net, x = Net(), pictures()[0][:2]
    dense = trace(net, x).macs()
    assert cut_by(net, x, 1.0) is None
    assert 0.6 * dense < trace(cut_by(net, x, 1.32).model, x).macs() <= dense / 1.32


def test_what_cannot_be_is_refused(made, tmp_path):
    folder, _ = made

    def refused(match, own, **settings):
        with pytest.raises(SecateurError, match=match):
            secateur.train_prune(own, method="metapruning", target="macs<=40%", steps=2, **settings)

    refused(r"no metanetwork\.json", task(), metanetwork=str(tmp_path / "none"))
    other = task()
    other.build = lambda: nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4))
    refused("kernels of 36 values", other, metanetwork=str(folder))
    other.build = lambda: nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
    )
    refused("another architecture", other, metanetwork=str(folder))
    with pytest.raises(SecateurError, match="models"):
        Metapruning(models=0)
    none = task()
    none.inputs = None
    with pytest.raises(SecateurError, match="no example inputs"):
        train_metanetwork(none, Making(**MAKING), steps=2)


def test_the_command_line_makes_one_and_uses_it(tmp_path, capsys):
    pytest.importorskip("sklearn")
    out = tmp_path / "meta"
    making = [
        "--models",
        "1",
        "--meta-epochs",
        "1",
        "--hidden",
        "4",
        "--layers",
        "1",
        "--steps",
        "2",
        "--train",
        "64",
        "--batch",
        "32",
    ]
    assert main(["train", "metanetwork", "digits", *making, "--out", str(out), "--json"]) == 0
    about = json.loads(capsys.readouterr().out)
    assert about["task"] == "digits:digits-cnn" and about["phases"][-1]["phase"] == "metanetwork"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["meta"]
    assert main(["train", "metanetwork", "digits", *making, "--out", str(out)]) == 2
    assert "not empty" in capsys.readouterr().err
    use = [
        "train-prune",
        "digits",
        "--method",
        "metapruning",
        "--metanetwork",
        str(out),
        "--target",
        "macs<=43%",
    ]
    assert main([*use, "--steps", "2", "--train", "64", "--test", "50", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["met"] and report["after"]["macs"] <= 0.43 * report["before"]["macs"]
    assert (
        main([*use[:2], *use[2:4], "--metanetwork", str(tmp_path / "no"), "--target", "43%", "--steps", "2"])
        == 2
    )
    error = capsys.readouterr().err
    assert "metanetwork.json" in error and error.count("\n") == 1
