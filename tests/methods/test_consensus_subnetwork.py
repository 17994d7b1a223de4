"""Consensus sub-network: the worked example of its sheet, its invariants, and runs on real digits."""

import copy

import pytest
import torch
from torch import nn

import secateur
from secateur import SecateurError
from secateur.gates import Reading, penalty, place
from secateur.gates.laws import hard_step
from secateur.graph import trace
from secateur.method import make_method
from secateur.methods.consensus_subnetwork import disagreement, polarisation
from secateur.surgery import cut_units
from secateur.training import Recipe, fit

LOGITS = torch.tensor([[2, -1, 0.5], [1, -2, -0.5], [3, 0.5, 0.2], [0.5, -0.3, -0.1]])


def test_the_sheets_example():
    answers = hard_step(LOGITS)
    assert polarisation(answers).item() == pytest.approx(0.1458333, abs=1e-6)
    share = answers.mean(0)
    assert share.tolist() == [1, 0.25, 0.5] and (share >= 0.5).nonzero().flatten().tolist() == [0, 2]
    cost = share @ torch.tensor([4.0, 2, 2]) / 8
    assert cost.item() == 0.6875 and penalty(cost, target=0.5).item() == pytest.approx(0.1875)
    assert disagreement(share) == 0.5 and disagreement(torch.tensor([1.0, 0.02, 0.0])) == pytest.approx(0.02)


def test_the_order_of_a_batch_does_not_matter():
    answers = hard_step(LOGITS)
    assert polarisation(answers[[3, 1, 0, 2]]) == polarisation(answers)


class Residual(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x):
        return torch.relu(x + self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))


class Net(nn.Module):
    """A stem and four residual blocks on 1 x 8 x 8 pictures, 4 classes."""

    def __init__(self, width=8):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )
        self.blocks = nn.Sequential(*(Residual(width) for _ in range(4)))
        self.head = nn.Linear(width, 4)

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


def patterns(count=128):
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(count) % 4
    means = torch.randn(4, 1, 8, 8, generator=generator)
    return means[labels] + torch.randn(count, 1, 8, 8, generator=generator), labels


def run(target="macs<=60%", steps=60, **settings):
    torch.manual_seed(0)
    settings = {"lr": 0.05, "batch": 32, "optimizer": "sgd", "gate_lr": 1.0, **settings}
    return secateur.train_prune(
        Net(), method="consensus-subnetwork", target=target, data=patterns(), steps=steps, **settings
    )


def test_blocks_leave_until_the_target_holds_and_the_rest_runs_without_gates():
    pruned = run()
    assert pruned.report["met"] and pruned.report["after"]["macs"] <= 0.6 * pruned.report["before"]["macs"]
    assert len(pruned.model.blocks) < 4 and set(pruned.plan.keep) == {"blocks:layers"}
    row = pruned.report["phases"][0]
    assert 0 <= row["disagreement"] <= 0.5
    assert not any("laws" in name or "gate" in name for name, _ in pruned.model.named_parameters())


def test_polarisation_brings_the_inputs_to_agree():
    """The same run without it lets inputs disagree. Two seeds each."""
    with_, without = (
        [run(lambda_p=weight, seed=seed, steps=100).report["phases"][0]["disagreement"] for seed in range(2)]
        for weight in (2.0, 0.0)
    )
    assert max(with_) < 0.01 and min(without) > 0.05


def test_a_polarised_gated_net_is_the_extracted_one():
    torch.manual_seed(0)
    model = Net().eval()
    x, _ = patterns(16)
    graph = trace(model, x)
    gated = place(model, graph, lambda g: Reading(g.size, blocks=True), kinds=("layers",), inputs=x).eval()
    assert torch.equal(gated(x), model(x))
    law = gated.by_group()["blocks:layers"]
    with torch.no_grad():
        law.nets[1].get_submodule("2").bias.fill_(-1)
        law.nets[2].get_submodule("2").bias.fill_(-1)
    expected = gated(x)
    assert polarisation(law.answers()) == 0 and law.value().tolist() == [1, 0, 0, 1]
    small = copy.deepcopy(model)
    cut_units(small, graph, {"blocks:layers": torch.tensor([0, 3])})
    torch.testing.assert_close(small(x), expected, rtol=0, atol=1e-5)


def test_channels_where_they_are_asked_for():
    pruned = run(target="75%", gate="channels", steps=30)
    assert pruned.report["met"] and {g["kind"] for g in pruned.report["groups"] if g["kept"] < g["size"]} == {
        "channels"
    }


def test_batch_of_one_is_refused():
    with pytest.raises(SecateurError, match="one sample always agrees with itself"):
        run(batch=1)
    run(batch=1, lambda_p=0.0, steps=4)


@pytest.mark.parametrize("bad", [{"gate": "heads"}, {"width": 0}, {"gradient": "soft"}, {"ramp": 2.0}])
def test_settings_out_of_range_are_refused(bad):
    with pytest.raises(SecateurError):
        make_method("consensus-subnetwork", **bad)


def test_a_target_below_what_blocks_can_give_is_refused():
    with pytest.raises(SecateurError, match="can't be met"):
        run(target="macs<=1%", steps=2)


def test_ascent_and_other_rates_in_one_training():
    """A group of parameters may climb: what a Lagrangian's multipliers need."""
    model = nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(1.0)
    climber = nn.Parameter(torch.ones(()))
    fit(
        model,
        (torch.ones(4, 1), torch.zeros(4)),
        steps=1,
        loss=lambda m, batch: (m.weight * climber).sum(),
        parameters=[
            {"params": [model.weight], "lr": 0.1},
            {"params": [climber], "lr": 0.5, "maximize": True},
        ],
        recipe=Recipe(optimizer="sgd", momentum=0, batch=4, lr_schedule="constant", warmup=0, clip=0, lr=1.0),
    )
    assert model.weight.item() == pytest.approx(0.9) and climber.item() == pytest.approx(1.5)


def test_a_run_is_not_resumed_with_other_gates(tmp_path):
    folder, calls = tmp_path / "run", []

    def stop(model, batch):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    with pytest.raises(KeyboardInterrupt):
        run(steps=6, loss=stop, resume=folder, every=2)
    files = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(SecateurError, match="begun with another consensus-subnetwork gate"):
        run(steps=6, gate="channels", resume=folder, every=2)
    assert files and {path: path.read_bytes() for path in folder.iterdir()} == files


def test_a_group_that_all_inputs_skip_keeps_one_unit_and_the_plan_says_so(monkeypatch):
    share = torch.tensor([0.1, 0.3, 0.2, 0.0])
    monkeypatch.setattr(
        "secateur.methods.consensus_subnetwork.answers_over",
        lambda laws, runs: {name: (share, share) for name in laws},
    )
    pruned = run(steps=2)
    assert pruned.plan.keep["blocks:layers"].tolist() == [1]
    note = pruned.plan.notes["kept against the consensus: blocks:layers"]
    assert "one has to stay (1)" in note and "fine-tune" in note


class Stage(Net):
    """As Net, whose list of blocks also holds one that isn't residual and so has to stay."""

    def __init__(self, width=8):
        super().__init__(width)
        first = nn.Sequential(nn.Conv2d(width, width, 3, padding=1, bias=False), nn.ReLU())
        self.blocks = nn.Sequential(first, *self.blocks)


def test_a_stage_that_all_inputs_skip_leaves_where_another_block_of_it_stays(monkeypatch):
    share = torch.tensor([0.1, 0.3, 0.2, 0.0])
    monkeypatch.setattr(
        "secateur.methods.consensus_subnetwork.answers_over",
        lambda laws, runs: {name: (share, share) for name in laws},
    )
    pruned = secateur.train_prune(
        Stage(), method="consensus-subnetwork", target="macs<=60%", data=patterns(), steps=2, batch=32
    )
    assert pruned.plan.keep["blocks:layers"].tolist() == [] and len(pruned.model.blocks) == 1
    assert not any("against the consensus" in note for note in pruned.plan.notes)
