"""Units that leave in the middle of a training: moments, checkpoints, kills, and what is refused."""

import os
import signal
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn

import secateur
from secateur.errors import SecateurError
from secateur.graph import trace
from secateur.surgery import Shrinking
from secateur.training import fit
from secateur.training.cuts import Cuts
from secateur.training.fit import State
from secateur.training.masks import Masked, full_masks
from secateur.training.method import TrainMethod

X = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
DATA = (X, (X[:, 0] > 0).long() + (X[:, 1] > 0).long())
OPTIMIZERS = {
    "adam": {"optimizer": "adamw", "lr": 1e-2},
    "sgd": {"optimizer": "sgd", "lr": 0.1, "momentum": 0.9},
}


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 3))


def shrinking(model):
    return Shrinking(model, trace(model, X[:2]))


def each_third(state, now):
    """A unit from the middle leaves after each third step."""
    left = now.keep.get("0:channels", now.keep.get("0:neurons", torch.arange(12)))
    name = next(g.name for g in now.dense.prunable())
    return {name: left[left != left[len(left) // 2]]} if state.step % 3 == 2 and len(left) > 2 else None


def bits(model):
    return {name: (tuple(t.shape), t.tolist()) for name, t in model.state_dict().items()}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_moments_lose_what_their_parameters_lose(optimizer):
    model, seen = net(), []
    hook = Cuts(shrinking(model), lambda state, now: keep if state.step == 4 else None)
    keep = {next(g.name for g in hook.shrinking.dense.prunable()): torch.tensor([0, 3, 4, 9])}

    def copied(state):
        seen.append([{k: v.clone() for k, v in state.optimizer.state[p].items() if torch.is_tensor(v)} for p in model.parameters()])  # fmt: skip

    fit(model, DATA, steps=5, batch=16, after_step=[copied, hook, copied], **OPTIMIZERS[optimizer])
    before, after = seen[-2:]
    rows = [0, 3, 4, 9]
    names = [name for name, _ in model.named_parameters()]
    assert names == ["0.weight", "0.bias", "1.weight", "1.bias", "3.weight", "3.bias"]
    for name, old, new, parameter in zip(names, before, after, model.parameters(), strict=True):
        assert old.keys() == new.keys() and len(old) >= 1
        for key, value in old.items():
            cut = (
                value
                if key == "step" or name == "3.bias"
                else value[:, rows]
                if name == "3.weight"
                else value[rows]
            )
            assert torch.equal(new[key], cut), (name, key)
            assert key == "step" or new[key].shape == parameter.shape
    assert model[1].running_mean.shape == (4,) and model[1].num_features == 4


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_step_after_the_cut_is_that_of_the_masked_network(optimizer):
    """A network whose removed units are zero, with their moments, trains alike: no other weight is moved by them."""
    small, masked = net(), net()
    del small[1], masked[1]
    keep = torch.tensor([0, 3, 4, 9])
    hook = Cuts(shrinking(small), lambda state, now: {now.dense.prunable()[0].name: keep} if state.step == 4 else None)  # fmt: skip
    gone = torch.ones(12, dtype=torch.bool)
    gone[keep] = False

    def zero(state):
        if state.step >= 4:
            with torch.no_grad():
                masked[0].weight[gone], masked[0].bias[gone], masked[2].weight[:, gone] = 0, 0, 0

    run = {"steps": 12, "batch": 16, "clip": 0.0, "weight_decay": 0.1, **OPTIMIZERS[optimizer]}
    first = fit(small, DATA, after_step=[hook], **run)
    second = fit(masked, DATA, after_step=[zero], **run)
    assert first == pytest.approx(second, rel=1e-5)
    assert torch.allclose(small[2].weight, masked[2].weight[:, keep], atol=1e-6)


def test_nothing_leaves_nothing_changes():
    plain, hooked = net(), net()
    run = {"steps": 9, "batch": 16, "lr": 1e-2}
    losses = fit(plain, DATA, **run)
    hook = Cuts(shrinking(hooked), lambda state, now: {} if state.step == 3 else None)
    assert fit(hooked, DATA, after_step=[hook], **run) == losses
    assert bits(plain) == bits(hooked)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_stopped_run_goes_on_at_its_size_to_the_same_bits(optimizer, tmp_path):
    run = {"steps": 24, "batch": 16, **OPTIMIZERS[optimizer]}
    whole = net()
    losses = fit(whole, DATA, after_step=[Cuts(shrinking(whole), each_third)], **run)
    assert whole[0].out_features == 4
    file = tmp_path / "run.safetensors"
    for stop in (10, 11, 17, None):

        def stopping(state, stop=stop):
            if state.step == stop:
                raise KeyboardInterrupt

        model = net()
        hook = Cuts(shrinking(model), each_third)
        try:
            got = fit(
                model, DATA, after_step=[hook], after_backward=[stopping], checkpoint=file, every=4, **run
            )
        except KeyboardInterrupt:
            continue
    assert got == losses and bits(model) == bits(whole)
    again = net()
    hook = Cuts(shrinking(again), each_third)
    assert fit(again, DATA, after_step=[hook], checkpoint=file, every=4, **run) == losses
    assert bits(again) == bits(whole) and again[3].in_features == 4


def test_killed(tmp_path):
    """SIGKILL right behind a cut; the same call goes on to the bits of a run that was never stopped."""
    file, run = tmp_path / "run.safetensors", {"steps": 18, "batch": 16, "lr": 1e-2, "every": 3}
    script = textwrap.dedent(f"""
        import os, sys
        sys.path.insert(0, {os.path.dirname(__file__)!r})
        import test_cuts as t
        model = t.net()
        die = lambda state: os.kill(os.getpid(), 9) if state.step == 11 else None
        cuts = t.Cuts(t.shrinking(model), t.each_third)
        t.fit(model, t.DATA, after_step=[cuts, die], checkpoint={str(file)!r}, **{run!r})
    """)
    killed = subprocess.run([sys.executable, "-c", script], check=False)
    assert killed.returncode == -signal.SIGKILL and file.exists()
    resumed, whole = net(), net()
    losses = fit(resumed, DATA, after_step=[Cuts(shrinking(resumed), each_third)], checkpoint=file, **run)
    assert losses == fit(whole, DATA, after_step=[Cuts(shrinking(whole), each_third)], **run)
    assert bits(resumed) == bits(whole)


def test_a_state_of_another_shape_is_refused():
    model = net()
    hook = Cuts(shrinking(model), each_third)
    optimizer = torch.optim.Adam(model.parameters())
    model(X).sum().backward()
    optimizer.step()
    state = State(model, optimizer, 5, 2)
    optimizer.state[model[0].weight]["exp_avg_sq"] = torch.zeros(6)  # a row's, as Adafactor's
    before = bits(model)
    with pytest.raises(
        SecateurError,
        match=r"state is of another shape: exp_avg_sq of parameter 0 is \[6\], the parameter \[12, 6\]",
    ):
        hook(state)
    assert bits(model) == before and not hook.shrinking.keep
    dense = net()
    seen = []
    fit(dense, DATA, steps=2, batch=16, at_end=seen.append)
    moments = seen[0].optimizer.state_dict()["state"]
    with pytest.raises(SecateurError, match="another shape"):
        fit(nn.Sequential(nn.Linear(6, 11), nn.Linear(11, 3)), DATA, steps=2, batch=16, moments=moments)


def test_what_can_not_follow_is_refused():
    class Behind(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = net()

        def forward(self, x):
            return self.model(x)

    behind = Behind()
    run = {"steps": 6, "batch": 16}
    with pytest.raises(SecateurError, match="what trains is a Behind"):
        fit(behind, DATA, after_step=[Cuts(shrinking(behind.model), each_third)], **run)
    model = net()
    masks = full_masks({"0.weight": model[0].weight})
    with pytest.raises(SecateurError, match="masks of its old size"):
        fit(model, DATA, after_step=[Cuts(shrinking(model), each_third), Masked(model, masks)], **run)


class Halving(TrainMethod):
    """A third of the neurons leaves within one phase, then another phase follows."""

    name = "halving"
    removes = "units"
    kinds = ("neurons", "channels")

    def prune(self, job):
        cuts = job.cuts(each_third)
        before = job.snapshot()
        job.train("pruning", after_step=[cuts])
        for refused, match in (
            (lambda: job.restore(before), "before a cut"),
            (lambda: job.cut({}), "was cut before"),
        ):
            with pytest.raises(SecateurError, match=match):
                refused()
        with pytest.raises(SecateurError, match="another shape"):
            job.train("with the first's moments", moments={0: {"exp_avg": torch.zeros(12, 6)}})
        job.train("after", moments=job.moments)
        return job.plan()


def test_the_plan_speaks_of_the_dense_network():
    pruned = secateur.train_prune(net(), method=Halving(), target="70%", data=DATA, steps=12, batch=16)
    (kept,) = pruned.plan.keep.values()
    assert kept.tolist() == [0, 1, 2, 3, 8, 9, 10, 11]
    assert pruned.plan.values["3.weight"].shape == (3, 12)
    fresh = net()
    secateur.apply_plan(fresh, pruned.plan)
    assert bits(fresh) == bits(pruned.model) and fresh[0].out_features == 8
