"""SPA and OBSPA: the worked examples of the sheet `spa`, least squares done independently, invariants."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import secateur
from secateur import SecateurError
from secateur.scores import criteria
from secateur.scores.criteria import normalise
from secateur.utils.inputs import noise_like


def two_layers(first, second):
    net = nn.Sequential(nn.Linear(len(first[0]), len(first)), nn.Linear(len(first), len(second))).eval()
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor(first))
        net[1].weight.copy_(torch.tensor(second))
        net[0].bias.zero_()
        net[1].bias.zero_()
    return net


def convolutions():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, stride=2, groups=8),
        nn.Conv2d(8, 12, 3, padding=1),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, 5),
    ).eval()


def trained(net, steps=30):
    """Some steps on noise, so that BatchNorm has statistics and weights differ in use."""
    torch.manual_seed(1)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    net.train()
    for _ in range(steps):
        x = torch.randn(16, 3, 10, 10)
        F.cross_entropy(net(x), (x.mean((1, 2, 3)) > 0).long()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return net.eval()


def pairs(count=3, size=8):
    generator = torch.Generator().manual_seed(2)
    return [
        (torch.randn(size, 3, 10, 10, generator=generator), torch.randint(0, 5, (size,), generator=generator))
        for _ in range(count)
    ]


IMAGE = torch.zeros(1, 3, 10, 10)


# The sheet's examples


def test_f_scores_of_coupled_channels():
    """L1 over rows of W1 and columns of W2: [5, 2, 6]; over their mean [1.1538, 0.4615, 1.3846]; channel 1 leaves."""
    net = two_layers([[1, -2], [0, 1], [3, 1.0]], [[1, 0, 2], [-1, 1, 0.0]])
    graph = secateur.trace(net, torch.randn(2, 2))
    values = {name: criteria.magnitude(p) for name, p in net.named_parameters()}
    scores = graph["0:neurons"].reduce(values, "sum", ("out", "in"))
    assert scores.tolist() == [5, 2, 6]
    assert normalise(scores, "mean").tolist() == pytest.approx([1.1538, 0.4615, 1.3846], abs=1e-4)
    pruned = secateur.prune(net, torch.randn(2, 2), method="spa", target="67%")
    assert pruned.plan.keep["0:neurons"].tolist() == [0, 2]


def test_g_obspa_on_columns():
    """Column scores [7.5, 16.667, 27.273]; without column 0: [[0, 2, 0], [0, -1, 3.5]]; error 3.75, plain deletion 7.5."""
    x = torch.tensor([[1, 0, 1, 2], [0, 1, 1, 0], [1, 1, 0, 1.0]])
    weight = torch.tensor([[1, 2, -1], [0.5, -1, 3]])
    inverse = torch.linalg.inv(2 * x @ x.T)
    columns = 2 * criteria.obs(weight, inverse).sum(0)
    assert columns.tolist() == pytest.approx([7.5, 16.667, 27.273], abs=1e-3)
    net = two_layers(torch.eye(3).tolist(), weight.tolist())
    pruned = secateur.prune(net, x.T[:1], method="obspa", target="67%", data=[x.T.contiguous()], damping=0.0)
    assert pruned.plan.keep["0:neurons"].tolist() == [1, 2]
    assert torch.allclose(pruned.model[1].weight, torch.tensor([[2, 0], [-1, 3.5]]), atol=1e-5)
    expected = weight @ x
    error = (pruned.model(x.T).T - expected).square().sum().item()
    plain = (weight[:, 1:] @ x[1:] - expected).square().sum().item()
    assert error == pytest.approx(3.75, abs=1e-4) and plain == pytest.approx(7.5, abs=1e-4)


@pytest.mark.parametrize("method", ["spa", "obspa"])
def test_h_everything_kept_is_the_identity(method):
    net = trained(convolutions())
    pruned = secateur.prune(net, IMAGE, method=method, target="100%", data=pairs())
    assert not pruned.plan.values
    for name, value in net.state_dict().items():
        assert torch.equal(pruned.model.state_dict()[name], value)


@pytest.mark.parametrize("method", ["spa", "obspa"])
def test_h_permuted_channels_leave_permuted(method):
    net = trained(convolutions())
    order = torch.randperm(12)
    other = copy.deepcopy(net)
    with torch.no_grad():
        for tensor in (other[4].weight, other[4].bias, *other[5].parameters(), *other[5].buffers()):
            if tensor.dim():
                tensor.copy_(tensor[order])
        other[9].weight.copy_(other[9].weight[:, order])
    found = [secateur.prune(n, IMAGE, method=method, target="50%", data=pairs()) for n in (net, other)]
    kept = [set(p.plan.keep["4:channels"].tolist()) for p in found]
    assert {order[unit].item() for unit in kept[1]} == kept[0]
    x = torch.randn(2, 3, 10, 10)
    assert torch.allclose(found[0].model(x), found[1].model(x), atol=1e-4)


# Normalisation and budget


def test_normalisations_by_hand():
    scores = torch.tensor([1.0, 2.0, 3.0])
    expected = {
        "none": [1, 2, 3],
        "sum": [1 / 6, 2 / 6, 3 / 6],
        "mean": [0.5, 1, 1.5],
        "max": [1 / 3, 2 / 3, 1],
        "gaussian": [-1, 0, 1],
    }
    for how, values in expected.items():
        assert normalise(scores, how).tolist() == pytest.approx(values)
    assert normalise(torch.tensor([-1.0, 1.0, -4.0]), "mean").tolist() == [-0.5, 0.5, -2]


def test_groups_compete_and_a_share_counts_units_of_all():
    """One layer's units are all stronger without normalisation, so that the others leave first."""
    first, last = [[9.0, 9.0], [8.0, 8.0], [7.0, 7.0]], [[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]]
    net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    with torch.no_grad():
        for p in net.parameters():
            p.fill_(0.1)
        net[0].weight.copy_(torch.tensor(first))
        net[4].weight[:, :3].copy_(torch.tensor(last))
    pruned = secateur.prune(net, torch.ones(1, 2), method="spa", normalise="none", target=4 / 7)
    assert pruned.plan.keep["2:neurons"].tolist() == [2]  # scores 2.3, 4.3, 6.3, 0.5 against 18.4, 16.4, 14.4
    assert "0:neurons" not in pruned.plan.keep


@pytest.mark.parametrize("target", ["macs<=60%", "params<=70%"])
def test_a_budget_of_the_whole_network(target):
    report = secateur.prune(
        trained(convolutions()), IMAGE, method="obspa", target=target, data=pairs()
    ).report
    assert report["met"]


# Closed-form repair


def lstsq(rows, weight, keep):
    """The weights on `keep` that give what all gave: rows [n, in], weight [out, in]."""
    return torch.linalg.lstsq(rows[:, keep].double(), rows.double() @ weight.double().T).solution.T.float()


def test_convolutions_are_solved_for_as_least_squares_of_their_patches():
    net = trained(convolutions())
    data = [torch.randn(40, 3, 10, 10)]
    pruned = secateur.prune(
        net,
        IMAGE,
        method="obspa",
        target="60%",
        data=data,
        damping=0.0,
        batchnorm="keep",
        kinds=("channels",),
    )
    keep = pruned.plan.keep["0:channels"]
    with torch.no_grad():
        seen = net[:4](data[0])
    patches = F.unfold(seen, 3, padding=1).transpose(1, 2).reshape(-1, 72)
    columns = (keep[:, None] * 9 + torch.arange(9)).flatten()
    expected = lstsq(patches, net[4].weight.detach().flatten(1), columns).reshape(12, -1, 3, 3)
    rows = pruned.plan.keep.get("4:channels", torch.arange(12))
    assert torch.allclose(pruned.model[4].weight, expected[rows], atol=2e-3)
    # the depthwise layer between has one input a filter: nothing to make up with
    assert torch.equal(pruned.model[3].weight, net[3].weight[keep])


def test_grouped_convolutions_are_solved_for_group_by_group():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 6, 3, groups=2, padding=1)).eval()
    data = [torch.randn(30, 3, 6, 6)]
    pruned = secateur.prune(net, data[0][:1], method="obspa", target="75%", data=data, damping=0.0)
    keep = pruned.plan.keep["0:channels"]
    assert len(keep) == 3  # of 4 units: the same offset of both groups
    with torch.no_grad():
        seen = net[:2](data[0])
    for half in range(2):
        patches = F.unfold(seen[:, 4 * half : 4 * half + 4], 3, padding=1).transpose(1, 2).reshape(-1, 36)
        columns = (keep[:, None] * 9 + torch.arange(9)).flatten()
        weight = net[2].weight.detach()[3 * half : 3 * half + 3].flatten(1)
        expected = lstsq(patches, weight, columns).reshape(3, 3, 3, 3)
        assert torch.allclose(pruned.model[2].weight[3 * half : 3 * half + 3], expected, atol=2e-3)


def test_repair_comes_nearer_to_the_dense_network_than_deletion():
    net = trained(convolutions())
    data = pairs(6, 16)
    x = torch.cat([x for x, _ in data])
    errors = []
    for method in ("spa", "obspa"):
        settings = {"criterion": "magnitude", "batchnorm": "keep"}
        model = secateur.prune(net, IMAGE, method=method, target="60%", data=data, **settings).model
        errors.append((model(x) - net(x)).square().mean().item())
    assert errors[1] < 0.8 * errors[0]


def test_memory_is_bounded_by_running_more_often():
    from secateur.stats.hessians import every_matrix, hessians

    net = trained(convolutions())
    matrices = every_matrix(net)
    assert list(matrices) == ["0.weight", "3.weight", "4.weight", "9.weight"]
    all_at_once = {m.name: s.inputs.outer for m, s in hessians(net, pairs(), matrices)}
    runs = []
    net.register_forward_pre_hook(lambda *_: runs.append(1))
    one_by_one = {m.name: s.inputs.outer for m, s in hessians(net, pairs(), matrices, memory=1)}
    assert len(runs) == 4 * 3
    for name, outer in all_at_once.items():
        assert torch.allclose(outer, one_by_one[name])


# BatchNorm


def test_new_statistics_are_those_of_the_cut_network():
    net = trained(convolutions())
    data = [x for x, _ in pairs(1, 32)]
    pruned = secateur.prune(net, IMAGE, method="spa", target="60%", data=data, batchnorm="new")
    with torch.no_grad():
        first = pruned.model[0](data[0])
        second = pruned.model[4](pruned.model[3](pruned.model[2](pruned.model[1](first))))
    for norm, seen in ((pruned.model[1], first), (pruned.model[5], second)):
        assert torch.allclose(norm.running_mean, seen.mean((0, 2, 3)), atol=1e-3)
        assert torch.allclose(norm.running_var, seen.var((0, 2, 3)), rtol=1e-3)


def test_shifted_statistics_move_by_what_the_cut_changed():
    net = trained(convolutions())
    data = [x for x, _ in pairs(1, 32)]
    pruned = secateur.prune(net, IMAGE, method="spa", target="60%", data=data, batchnorm="shift")
    keep = pruned.plan.keep
    rows, units = (keep.get(n, torch.arange(s)) for n, s in (("0:channels", 8), ("4:channels", 12)))
    # what the first convolution gives doesn't change
    assert torch.allclose(pruned.model[1].running_mean, net[1].running_mean[rows], atol=1e-5)

    def seen(model):
        """What the second normalisation is given, behind a first one by the batch."""
        x = F.batch_norm(model[0](data[0]), None, None, model[1].weight, model[1].bias, training=True)
        return model[4](model[3](x.relu()))

    with torch.no_grad():
        before, after = seen(net)[:, units], seen(pruned.model)
    mean = net[5].running_mean[units] + after.mean((0, 2, 3)) - before.mean((0, 2, 3))
    var = net[5].running_var[units] * after.var((0, 2, 3)) / before.var((0, 2, 3))
    assert torch.allclose(pruned.model[5].running_mean, mean, atol=1e-5)
    assert torch.allclose(pruned.model[5].running_var, var, rtol=1e-3)


# Data, times and networks


def test_without_any_data():
    net = trained(convolutions())
    found = [
        secateur.prune(
            net, IMAGE, method="obspa", target="60%", calibration="noise", noise_samples=20, seed=s
        )
        for s in (0, 0, 1)
    ]
    assert found[0].plan == found[1].plan and found[0].plan != found[2].plan
    batches = noise_like(torch.zeros(1, 3, 64, 64), 20, torch.Generator().manual_seed(0), mean=0.5, std=0.25)
    assert [len(b) for b in batches] == [16, 4]
    assert batches[0].min() >= -2 and batches[0].max() <= 2
    assert batches[0].mean().abs() < 0.02 and abs(batches[0].std() - 4 / 12**0.5) < 0.02


@pytest.mark.parametrize("criterion", criteria.CRITERIA)
@pytest.mark.parametrize("method", ["spa", "obspa"])
def test_every_criterion_before_training(method, criterion):
    net = convolutions()
    before = copy.deepcopy(net.state_dict())
    pruned = secateur.prune(net, IMAGE, method=method, criterion=criterion, target="50%", data=pairs(2))
    kept = {g["name"]: g["kept"] for g in pruned.report["groups"]}
    assert kept["0:channels"] + kept["4:channels"] == 10 and pruned.model(IMAGE).shape == (1, 5)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


@pytest.mark.parametrize("criterion", [c for c in criteria.CRITERIA if c != "bn-scale"])
def test_every_criterion_on_a_language_model(tiny_llama, criterion):
    model = tiny_llama()
    ids = torch.randint(0, 64, (6, 12))
    pruned = secateur.prune(
        model, method="obspa", criterion=criterion, target="75%", data=ids, kinds=("neurons", "kv_groups")
    )
    open_ = [g for g in pruned.report["groups"] if g["reason"] in (None, "kept whole by the budget")]
    assert sum(g["size"] for g in open_) == 100 and sum(g["kept"] for g in open_) == 75
    assert torch.isfinite(pruned.model(ids).logits).all()


def test_pruned_at_the_start_it_still_trains():
    pruned = secateur.prune(convolutions(), IMAGE, method="spa", criterion="snip", target="50%", data=pairs())
    secateur.recover(pruned.model, pairs(), how="full", steps=3)
    assert all(torch.isfinite(p).all() for p in pruned.model.parameters())


def test_rounds_leave_the_statistics_of_units_that_stay():
    net = trained(convolutions())
    pruned = secateur.prune(net, IMAGE, method="obspa", target="50%", data=pairs(), schedule="iterative:3")
    fresh = copy.deepcopy(net)
    secateur.apply_plan(fresh, pruned.plan, inputs=IMAGE)
    for name, value in pruned.model.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], value), name


def test_a_criterion_that_says_nothing_here():
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    with pytest.raises(SecateurError, match="no normalisation"):
        secateur.prune(net, torch.ones(1, 3), method="spa", criterion="bn-scale", target="50%")


def test_nonsense_is_refused():
    net = convolutions()
    for settings, message in (
        ({"criterion": "charm"}, "no criterion 'charm'"),
        ({"aggregate": "median"}, "no aggregate 'median'"),
        ({"normalise": "softmax"}, "no normalise 'softmax'"),
        ({"batchnorm": "perhaps"}, "no batchnorm 'perhaps'"),
        ({"damping": -1.0}, "damping"),
        ({"method": "obspa", "calibration": "dreams"}, "no calibration 'dreams'"),
        ({"method": "obspa"}, "needs calibration data"),
        ({"criterion": "snip", "data": [torch.randn(2, 3, 10, 10)]}, "pairs"),
    ):
        with pytest.raises(SecateurError, match=message):
            secateur.prune(net, IMAGE, **{"method": "spa", "target": "50%", **settings})
