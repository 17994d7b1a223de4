"""EcoDiff: the worked examples of its sheet, its invariants, and a short run on a sampler of its own."""

import copy

import pytest
import torch
from torch import nn

import secateur
from secateur import SecateurError
from secateur.gates import HardConcrete, place
from secateur.graph import trace
from secateur.method import make_method
from secateur.methods.ecodiff import regulariser
from secateur.pruning.allocate import Competitor, build_path, kept_after
from secateur.surgery import cut_units
from secateur.tasks.networks.mnist_dit import Attention, MnistDit, from_published
from secateur.training import Task
from secateur.training.sampling import Sampler, sample

LAMBDAS = [[3.0, 1, 2], [0.5, 2.5, -1, 4]]


def laws():
    found = [HardConcrete(len(row)) for row in LAMBDAS]
    for law, row in zip(found, LAMBDAS, strict=True):
        law.logits.data = torch.tensor(row)
    return found


def test_the_sheets_regulariser():
    assert regulariser(laws()).item() == 2.0
    assert regulariser(laws(), "sigmoid").item() == pytest.approx(0.829994, abs=1e-6)


def test_the_sheets_budget():
    """Global, 0.7 kept: 4 of 7 units, [1, 0, 1] and [0, 1, 0, 1]."""
    groups = [Competitor(name, "neurons", torch.tensor(row)) for name, row in zip("ab", LAMBDAS, strict=True)]
    kept = kept_after(groups, build_path(groups, "per-kind")[:3])
    assert {name: units.tolist() for name, units in kept.items()} == {"a": [0, 2], "b": [1, 3]}


class Denoiser(nn.Module):
    """Attention over four tokens and a feed-forward part; predicts data from a mixture."""

    def __init__(self, width=16):
        super().__init__()
        self.enter, self.leave = nn.Linear(2, width), nn.Linear(width, 2)
        self.attention = Attention(width, 4)
        self.up, self.down = nn.Linear(width, 24), nn.Linear(24, width)

    def forward(self, x):
        h = self.enter(x)
        h = h + self.attention(h)
        return self.leave(h + self.down(torch.relu(self.up(h))))


def sampler(steps=3):
    def start(count, seed):
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(count, 4, 2, generator=generator), torch.arange(count)

    return Sampler(steps, start, lambda m, z, i, asked: z + (m(z) - z) / (steps - i))


def task():
    torch.manual_seed(0)
    model = Denoiser()
    # half of the neurons and one head do nothing
    with torch.no_grad():
        model.down.weight.mul_(10)
        model.up.bias.fill_(1)
        model.down.weight[:, ::2] = 0
        model.attention.to_out.weight[:, 4:8] = 0
    return Task(
        "toy",
        Denoiser,
        (torch.randn(8, 4, 2), torch.zeros(8)),
        inputs=torch.randn(2, 4, 2),
        pretrained=lambda: copy.deepcopy(model),
        loss=lambda m, batch: (m(batch[0]) ** 2).mean(),
        sampler=sampler(),
    )


def run(steps=40, **settings):
    settings = {"samples": 16, "gate_lr": 0.2, "target": "75%", **settings}
    return secateur.train_prune(task(), method="ecodiff", steps=steps, **settings)


@pytest.mark.parametrize("match", ["final", "step"])
def test_units_that_do_nothing_leave_first(match):
    pruned = run(match=match, gate_lr=0.3)
    assert pruned.report["met"]
    kept = {g["kind"]: g for g in pruned.report["groups"] if g["kind"] in ("heads", "neurons")}
    assert kept["neurons"]["kept"] <= 19
    neurons = pruned.plan.keep["model:neurons" if "model:neurons" in pruned.plan.keep else "up:neurons"]
    assert set(range(1, 24, 2)) <= set(neurons.tolist())


def test_the_network_itself_is_not_trained():
    dense, pruned = task().pretrained(), run(steps=3)
    own = dict(dense.named_parameters())
    assert torch.equal(pruned.model.enter.weight, own["enter.weight"])
    assert all(p.requires_grad for p in pruned.model.parameters())


def test_closed_gates_draw_what_the_cut_model_draws():
    """Also where a module loses all heads but one; the masked sampler is the pruned one."""
    model = task().pretrained().eval()
    graph = trace(model, torch.randn(2, 4, 2))
    gated = place(model, graph, lambda g: HardConcrete(g.size), kinds=("heads", "neurons")).eval()
    keep = {}
    for name, law in gated.by_group().items():
        keep[name] = torch.tensor([1]) if graph[name].kind == "heads" else torch.arange(5)
        gated.fixed[name] = torch.zeros(law.units).index_fill(0, keep[name], 1)
    noise, asked = sampler().start(6, 0)
    with torch.no_grad():
        masked = sample(gated, sampler(), noise, asked)
        cut_units(model, graph, keep)
        torch.testing.assert_close(sample(model, sampler(), noise, asked), masked)


def state(model):
    return dict(model.state_dict())


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_the_budget_the_seed_and_a_saved_plan(tmp_path):
    pruned, again, other = run(steps=6), run(steps=6), run(steps=6, seed=1)
    kept = {g["name"]: g["kept"] / g["size"] for g in pruned.report["groups"] if g["reason"] is None}
    assert pruned.report["met"] and max(kept.values()) <= 0.76
    assert pruned.plan == again.plan and equal(state(pruned.model), state(again.model))
    assert pruned.report["phases"] == again.report["phases"] != other.report["phases"]
    whole = run(steps=2, target="100%")
    assert not whole.plan.keep and equal(state(whole.model), state(task().pretrained()))
    pruned.plan.save(tmp_path)
    fresh = task().pretrained()
    secateur.apply_plan(fresh, secateur.Plan.load(tmp_path))
    assert equal(state(fresh), state(pruned.model))


def test_a_run_that_was_stopped_goes_on_to_the_same_bits(tmp_path, monkeypatch):
    """Stopped inside the phase of the gates, between two checkpoints."""
    whole = run(steps=8)
    stop, seen = 5, []

    def interrupted(*args, **kwargs):
        seen.append(1)
        if len(seen) == stop:
            raise KeyboardInterrupt
        return sample(*args, **kwargs)

    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr("secateur.methods.ecodiff.sample", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(steps=8, resume=folder, every=3)
    assert list(folder.glob("*.safetensors"))
    resumed = run(steps=8, resume=folder, every=3)
    assert resumed.plan == whole.plan and equal(state(resumed.model), state(whole.model))
    assert resumed.report["phases"] == whole.report["phases"]


def test_a_task_that_does_not_draw_is_refused():
    x, y = torch.randn(8, 6), torch.zeros(8, dtype=torch.int64)
    with pytest.raises(SecateurError, match="draws in steps"):
        secateur.train_prune(
            nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2)),
            method="ecodiff",
            target="50%",
            data=(x, y),
            steps=2,
        )


@pytest.mark.parametrize("bad", [{"match": "none"}, {"delta": 0.0}, {"samples": 0}, {"penalty": "l7"}])
def test_settings_out_of_range_are_refused(bad):
    with pytest.raises(SecateurError):
        make_method("ecodiff", **bad)


def test_published_weights_come_under_the_networks_names():
    """Against PyTorch's own attention with the stacked matrix."""
    torch.manual_seed(0)
    stacked = nn.MultiheadAttention(64, 4, batch_first=True)
    own = Attention(64, 4)
    prefix = "transformer.0.self_attn."
    renamed = from_published({prefix + name: value for name, value in stacked.state_dict().items()})
    own.load_state_dict({name.removeprefix("blocks.0.attention."): value for name, value in renamed.items()})
    x = torch.randn(3, 5, 64)
    torch.testing.assert_close(own(x), stacked(x, x, x)[0], rtol=1e-5, atol=1e-5)
    assert sum(p.numel() for p in MnistDit().parameters()) == 208_705
