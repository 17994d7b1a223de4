"""Units that leave while training: cut, trained on, and a plan at dense shape; a method made for the test."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import secateur
from secateur.errors import SecateurError
from secateur.gates import choice_of
from secateur.method import make_method
from secateur.pruning.plan import Plan
from secateur.pruning.target import parse_target
from secateur.taxonomy import MethodInfo
from secateur.training.job import Job
from secateur.training.losses import default_loss
from secateur.training.method import TrainMethod
from secateur.training.recipe import Recipe
from secateur.training.task import Task


@dataclass
class Norms(TrainMethod):
    """Channels by the norm of their weights after training; the small network is trained on."""

    late: bool = False
    name: ClassVar[str] = "norms"
    removes: ClassVar[str] = "units"
    info = MethodInfo(
        title="Norms",
        spec="none",
        objects="C",
        granularity="struct",
        speedup="univ",
        when="PDT",
        criteria="NORM",
        data="data",
        models="cnn",
    )

    def prune(self, job: Job) -> Plan:
        job.train("dense", steps=4)
        context = job.context()
        weights = dict(job.model.named_parameters())
        scores = {g.name: g.reduce({n: w.detach() ** 2 for n, w in weights.items()}) for g in context.groups}
        keep = context.allocate(scores)
        if self.late:
            return job.plan(keep=keep)
        job.cut(keep)
        job.train("tune", steps=5)
        return job.plan()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8)
        self.hidden, self.head = nn.Linear(128, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.hidden(torch.relu(self.norm(self.conv(x))).flatten(1))))


def run(target: str = "50%", **settings: Any) -> Any:
    torch.manual_seed(0)
    x = torch.randn(48, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    data = (x, torch.arange(48) % 4)
    settings = {"steps": 4, "batch": 8, "lr": 0.05, "data": data, **settings}
    method = settings.pop("method", Norms())
    return secateur.train_prune(Net(), method=method, target=target, **settings)


@pytest.mark.parametrize("late", [False, True])
def test_a_plan_of_a_cut_network_makes_the_same_from_a_fresh_one(late: bool, tmp_path: Path) -> None:
    pruned = run(method=Norms(late=late))
    assert pruned.model.conv.out_channels == 4 and pruned.model.hidden.in_features == 64
    assert pruned.model.hidden.out_features == 8 and pruned.report["met"]
    pruned.plan.save(tmp_path)
    torch.manual_seed(5)
    fresh = Net()
    secateur.apply_plan(fresh, Plan.load(tmp_path))
    mine, theirs = pruned.model.state_dict(), fresh.state_dict()
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
    kept = {g["name"]: g["kept"] for g in pruned.report["groups"] if g["reason"] is None}
    assert sorted(kept.values()) == [4, 8]


def test_targets_of_the_whole_model_and_everything_kept() -> None:
    report = run("macs<=60%").report
    assert (
        report["met"]
        and 0.5 * report["before"]["macs"] < report["after"]["macs"] <= 0.6 * report["before"]["macs"]
    )
    whole = run("100%")
    assert whole.report["met"] and not whole.plan.keep


def test_stopped_after_the_cut_it_goes_on(tmp_path: Path) -> None:
    calls: list[int] = []

    def loss(model: nn.Module, batch: Any) -> Tensor:
        calls.append(1)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return default_loss(model, batch)

    whole = run()
    with pytest.raises(KeyboardInterrupt):
        run(loss=loss, resume=tmp_path / "run", every=2)
    resumed = run(loss=loss, resume=tmp_path / "run", every=2)
    assert len(calls) < 8 + 4
    mine, theirs = whole.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine) and whole.plan == resumed.plan


def test_groups_without_a_gate_are_told_of_in_the_plan() -> None:
    """A width of channels that a norm mixes can't be chosen; the neurons behind it can."""

    class Widths(Norms):
        def prune(self, job: Job) -> Plan:
            gated = job.gated(job.context(), lambda group: choice_of(group, lambda: 1.0))
            assert [*gated.groups] == ["hidden:neurons"]
            return job.plan()

    net = Net()
    net.norm = nn.GroupNorm(2, 8)
    data = (torch.randn(8, 1, 8, 8), torch.arange(8) % 4)
    plan = secateur.train_prune(net, method=Widths(), target="100%", steps=1, data=data).plan
    told = {name: note for name, note in plan.notes.items() if name.startswith("no gate")}
    assert [*told] == ["no gate: conv:channels"] and "norms mix its units" in told["no gate: conv:channels"]


def test_two_phases_of_one_name_are_refused() -> None:
    class Twice(Norms):
        def prune(self, job: Job) -> Plan:
            job.train("dense")
            job.train("dense")
            return job.plan()

    with pytest.raises(SecateurError, match="two phases are named 'dense'"):
        run(method=Twice())


@dataclass
class Looks(Norms):
    """Looks at its job, and keeps everything."""

    look: ClassVar[Any]

    def prune(self, job: Job) -> Plan:
        self.look(job)
        return job.plan()


def looked(look: Any, **settings: Any) -> Any:
    Looks.look = staticmethod(look)
    return run("100%", method=Looks(), **settings)


def test_batches_and_losses_are_those_of_the_training_data() -> None:
    def look(job: Job) -> None:
        x, y = job.task.train
        assert job.epoch == 6 and [job.step_of(text) for text in ("1", "2it", "0.5ep", "50%")] == [1, 2, 3, 2]
        drawn = torch.cat(list(job.batches(6)))
        assert len(drawn) == 48 and torch.equal(drawn.flatten(1).sort(0).values, x.flatten(1).sort(0).values)
        assert not torch.equal(drawn, x) and [len(b) for b in job.batches(2)] == [8, 8]
        mode = job.model.training
        job.model.eval()
        own = nn.functional.cross_entropy(job.model(x), y).item()
        job.model.train(mode)
        assert job.losses(48, single=True)() == pytest.approx({"loss": 48 * own}, rel=1e-5)
        assert job.losses(999, single=True)() == pytest.approx({"loss": 48 * own}, rel=1e-5)  # all there are
        few = job.losses(3, single=True)()["loss"]
        assert job.losses(9, single=True)()["loss"] != few and job.losses(3, single=True)()["loss"] == few
        assert job.model.training == mode
        with pytest.raises(SecateurError, match="it has one loss"):
            job.losses(48)

    looked(look)


def test_new_layers_are_drawn_from_the_seed_and_the_place() -> None:
    drawn: dict[Any, float] = {}

    def look(job: Job) -> None:
        before = torch.get_rng_state()
        for place in ("a", "b"):
            with job.seeded(place):
                drawn[job.seed, place] = torch.rand(()).item()
        with job.seeded("a"):
            assert torch.rand(()).item() == drawn[job.seed, "a"]
        assert torch.equal(torch.get_rng_state(), before)

    for seed in (0, 1):
        looked(look, seed=seed)
    assert len(set(drawn.values())) == 4


def test_statistics_are_taken_anew_on_so_many_batches() -> None:
    def look(job: Job) -> None:
        norm = job.model.get_submodule("norm")
        before = norm.running_mean.clone()
        job.reestimate(0)
        assert torch.equal(norm.running_mean, before)
        job.reestimate(6)
        mean = job.model.get_submodule("conv")(job.task.train[0]).mean((0, 2, 3))
        torch.testing.assert_close(norm.running_mean, mean, rtol=1e-4, atol=1e-5)

    looked(look)


def test_batchnorm_statistics_are_those_of_what_training_sees():
    """Means of an input that the augmentation doubles are doubled."""
    net = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2))
    x = torch.randn(64, 3, generator=torch.Generator().manual_seed(0)) + 5
    task = Task(
        "doubled", lambda: net, (x, torch.arange(64) % 2), inputs=x[:1], augment=lambda b, g: (2 * b[0], b[1])
    )
    job = Job(net, task, make_method("masksparsity"), parse_target("50%"), 1, Recipe(batch=16), inputs=x[:1])
    job.reestimate(4)
    torch.testing.assert_close(net[0].running_mean, 2 * x.mean(0), rtol=1e-3, atol=1e-3)
    assert all(len(batch) == 16 for batch in job.batches(2))
    torch.testing.assert_close(torch.cat([*job.batches(4)]).mean(0), x.mean(0))


@pytest.mark.parametrize("clean", [True, False])
def test_the_folder_of_a_run_is_removed_at_its_end_or_stays(clean: bool, tmp_path: Path) -> None:
    run("100%", resume=tmp_path / "run", clean=clean)
    assert (tmp_path / "run").exists() != clean
