"""Criteria of single weights against the worked examples of the sheet `weight-baselines` and against autograd."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from secateur import SecateurError
from secateur.scores import criteria

NAMES = ["0.weight", "1.weight"]


@pytest.fixture
def net():
    """f = w₂(w₁x) of the sheet."""
    net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[1, -2], [0.5, 1]]))
        net[1].weight.copy_(torch.tensor([[1.0, -1.0]]))
    return net


X = torch.tensor([[1.0, 2.0]])


def half_square(model, x):
    return 0.5 * (model(x) - 1).square().sum()


def close(found, *expected, tolerance=1e-4):
    for name, values in zip(NAMES, expected, strict=True):
        assert torch.allclose(found[name], torch.tensor(values), atol=tolerance, rtol=tolerance), (
            name,
            found,
        )


def test_the_loss_of_the_worked_example(net):
    assert half_square(net, X).item() == 21.125


def test_snip(net):
    found = criteria.snip(net, [X], NAMES, half_square)
    close(found, [[0.07692, 0.30769], [0.03846, 0.15385]], [[0.23077, 0.19231]])


def test_hessian_gradient_products_of_grasp_and_crop(net):
    products = [[290.875, -1163.5], [-134.875, -539.5]], [[-703.625, -621.5625]]
    found = criteria.hessian_gradient(net, [X], NAMES, half_square)
    close({name: -value for name, value in found.items()}, *products)
    total = abs(sum(sum(map(sum, rows)) for rows in products))
    scores = criteria.grasp(net, [X], NAMES, half_square)
    close({name: -value * total for name, value in scores.items()}, *products, tolerance=1e-3)
    assert min((v.min(), n) for n, v in scores.items())[1] == "0.weight"
    assert scores["0.weight"].argmin() == 0
    crop = criteria.crop(net, [X], NAMES, half_square)
    close(crop, [[290.875, 1163.5], [134.875, 539.5]], [[703.625, 621.5625]])


def test_synflow_and_the_conservation_of_its_sums(net):
    found = criteria.synflow(net, X, NAMES)
    close(found, [[1, 2], [0.5, 1.0]], [[3, 1.5]])
    assert [found[name].sum().item() for name in NAMES] == [4.5, 4.5]
    assert net[0].weight[0, 1] == -2 and net[0].weight.dtype == torch.float32


def test_taylor_rows(net):
    found = criteria.taylor(net, [X], NAMES, half_square)
    assert found["0.weight"].sum(1).tolist() == pytest.approx([718.25, 179.5625])
    gates = criteria.mean_gradient(net, [X], NAMES, half_square)["0.weight"] * net[0].weight
    assert gates.sum(1).square().tolist() == pytest.approx([380.25, 264.0625])


def test_taylor_averages_squares_over_batches(net):
    """g·w of w₂ at x = (1, 2) is -6.5·(-3, -2.5)·(1, -1); at x = (2, 0), f = 1, the loss is at its minimum."""
    found = criteria.taylor(net, [X, torch.tensor([[2.0, 0.0]])], NAMES, half_square)
    assert found["1.weight"].flatten().tolist() == pytest.approx([(6.5 * 3) ** 2 / 2, (6.5 * 2.5) ** 2 / 2])


def test_obd_and_obs_of_the_inputs_hessian():
    x = torch.tensor([[1, 0, 2, -1], [0, 1, 1, 1], [2, 1, 0, 0], [1, -1, 4, 0.0]])
    weight = torch.tensor([[1, -2, 0.9, 3], [-0.4, 0.3, 2, -1]])
    hessian = 2 / 4 * x.T @ x
    assert criteria.obd(weight, hessian)[0].tolist() == pytest.approx([1.5, 3, 4.2525, 4.5])
    inverse = torch.linalg.inv(hessian)
    found = criteria.obs(weight, inverse)
    assert found[0].tolist() == pytest.approx([0.4694, 1.0242, 1.4879, 2.3915], abs=1e-4)
    assert torch.allclose(criteria.obs(weight, criteria.inverse_diagonal(hessian, damping=0)), found)
    assert (found <= criteria.obd(weight, hessian) + 1e-6).all()


def test_damping_is_a_share_of_the_mean_diagonal():
    hessian = torch.tensor([[2.0, 1.0], [1.0, 4.0]])
    expected = torch.linalg.inv(hessian + 0.1 * 3.0 * torch.eye(2)).diagonal()
    assert torch.allclose(criteria.inverse_diagonal(hessian, 0.1), expected)
    assert torch.isfinite(criteria.inverse_diagonal(torch.zeros(2, 2), 0.01)).all()


def test_fisher_squares_single_samples():
    """f = w·x with loss f: the gradient is x, whatever the batch holds."""
    net = nn.Sequential(nn.Linear(2, 1, bias=False))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[2.0, -1.0]]))
    x = torch.tensor([[1.0, 3.0], [-1.0, 1.0]])
    found = criteria.fisher(net, [x], ["0.weight"], lambda model, batch: model(batch).mean())
    assert found["0.weight"].tolist() == [[0.5 * 4 * 1, 0.5 * 1 * (9 + 1) / 2]]


def test_hessian_diagonal_is_exact_for_separable_losses_and_near_otherwise(net):
    curvature = torch.tensor([[1.0, 3.0]])
    single = nn.Sequential(nn.Linear(2, 1, bias=False))
    with torch.no_grad():
        single[0].weight.copy_(torch.tensor([[2.0, -1.0]]))
    found = criteria.hessian_diagonal(
        single,
        [X],
        ["0.weight"],
        lambda model, x: 0.5 * (curvature * model[0].weight.square()).sum(),
        probes=1,
    )
    assert found["0.weight"].tolist() == [[0.5 * 4 * 1, 0.5 * 1 * 3]]
    # of the net: d²/dw₁² = (w₂ₖ xᵢ)², d²/dw₂² = (w₁x)²
    found = criteria.hessian_diagonal(net, [X], NAMES, half_square, probes=1000)
    close(found, [[0.5, 8], [0.125, 2]], [[4.5, 3.125]], tolerance=0.25)


def test_of_weights():
    weight = torch.tensor([[1.0, -2.0], [0.0, 2.0]])
    assert criteria.magnitude(weight).tolist() == [[1, 2], [0, 2]]
    assert criteria.l2(weight).tolist() == [[1, 4], [0, 4]]
    # ascending squares 0, 1, 4, 4: over 9, 9, 8, 4
    assert torch.allclose(criteria.lamp(weight), torch.tensor([[1 / 9, 4 / 8], [0, 4 / 4]]))
    # distances: between the rows (1, -2) and (0, 2) √17, in equal parts on two weights
    assert torch.allclose(criteria.fpgm(weight), torch.full((2, 2), math.sqrt(17) / 2))
    # between the columns (1, 0) and (-2, 2) √13
    assert torch.allclose(criteria.fpgm(weight, dim=1), torch.full((2, 2), math.sqrt(13) / 2))


@pytest.fixture
def classifier():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 3),
    )


@pytest.fixture
def pairs():
    return [
        (torch.randn(6, 1, 8, 8), torch.randint(0, 3, (6,))),
        (torch.randn(6, 1, 8, 8), torch.randint(0, 3, (6,))),
    ]


def test_pairs_are_scored_by_cross_entropy(classifier, pairs):
    names = ["0.weight", "5.weight"]
    classifier[1].running_mean.fill_(0.1)  # as if trained: eval mode
    default = criteria.snip(classifier, pairs, names)
    given = criteria.snip(classifier, pairs, names, lambda model, b: F.cross_entropy(model(b[0]), b[1]))
    assert all(torch.equal(default[name], given[name]) for name in names)
    cool = criteria.grasp(classifier, pairs, names, lambda model, b: F.cross_entropy(model(b[0]) / 200, b[1]))
    default = criteria.grasp(classifier, pairs, names)
    assert all(torch.allclose(default[name], cool[name], rtol=1e-4, atol=1e-9) for name in names)


def test_an_untrained_batchnorm_uses_the_batch_and_nothing_is_left_behind(classifier, pairs):
    before = {name: value.clone() for name, value in classifier.state_dict().items()}
    classifier.train()
    classifier[5].weight.requires_grad_(False)
    found = criteria.mean_gradient(classifier, pairs[:1], ["0.weight"])["0.weight"]
    assert classifier.training and classifier[1].training and classifier[1].track_running_stats
    assert not classifier[5].weight.requires_grad and classifier[0].weight.requires_grad
    assert classifier[0].weight.grad is None
    assert all(torch.equal(value, before[name]) for name, value in classifier.state_dict().items())
    expected = torch.autograd.grad(
        F.cross_entropy(classifier(pairs[0][0]), pairs[0][1]), classifier[0].weight
    )
    assert torch.allclose(found, expected[0], atol=1e-6)


@pytest.mark.parametrize("criterion", [c for c in criteria.CRITERIA if c not in criteria.OF_INPUTS])
def test_by_name_every_criterion_gives_finite_scores_of_the_shapes(classifier, pairs, criterion):
    names = ["0.weight", "5.weight"]
    found = criteria.score(criterion, classifier, names, pairs, inputs=pairs[0][0])
    for name in names:
        assert (
            found[name].shape == classifier.get_parameter(name).shape and found[name].dtype == torch.float32
        )
        assert torch.isfinite(found[name]).all()


def test_errors(classifier, pairs):
    with pytest.raises(SecateurError, match="no criterion 'charm'"):
        criteria.score("charm", classifier, ["0.weight"], pairs)
    with pytest.raises(SecateurError, match="pairs"):
        criteria.snip(classifier, [pairs[0][0]], ["0.weight"])
    with pytest.raises(SecateurError, match="scalar"):
        criteria.snip(classifier, pairs, ["0.weight"], lambda model, batch: model(batch[0]))
    with pytest.raises(SecateurError, match="example inputs"):
        criteria.score("synflow", classifier, ["0.weight"])
