"""LRP pruning: the sheet's worked example, its invariants, its behaviour on a toy, labels that are none."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import secateur
from secateur import SecateurError
from secateur.saliency.filters import filter_relevance, right_class
from secateur.tasks.networks.cifar_resnet import CifarResNet


def toy():
    net = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2, bias=False))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[1, -1], [0.5, 1], [-1, 0.25], [0.2, 0.3]]))
        net[0].bias.copy_(torch.tensor([0.5, 0, 0, 0]))
        net[2].weight.copy_(torch.tensor([[1, 2, -1, 0.5], [-1, 1, 3, 0.5]]))
    return net


def test_the_worked_example():
    x = torch.tensor([[1.0, 2.0], [1.0, 2.0]])
    data = [(x[:1], torch.tensor([0])), (x[1:], torch.tensor([1]))]
    pruned = secateur.prune(toy(), x[:1], method="lrp-pruning", target="75%", data=data)
    (scores,) = pruned.scores.values()
    expected = torch.tensor([0, 0.925926 + 0.862069, 0, 0.074074 + 0.137931])
    assert torch.allclose(scores.float(), expected, atol=1e-6)
    (kept,) = pruned.plan.keep.values()
    assert kept.tolist() in ([0, 1, 3], [1, 2, 3])
    assert torch.allclose(pruned.model(x), toy()(x), atol=1e-6)


@pytest.fixture(scope="module")
def resnet():
    torch.manual_seed(3)
    net = CifarResNet(8).eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.2, 0.2)
            module.running_var.uniform_(0.5, 1.5)
            module.weight.data.uniform_(0.5, 1.5)
    return net


def pictures(count=6):
    torch.manual_seed(5)
    return torch.randn(count, 3, 32, 32), torch.arange(count) % 10


def test_scores_of_a_batch_are_the_sum_of_its_parts(resnet):
    x, y = pictures()
    whole = filter_relevance(resnet, [(x, y)])
    parts = filter_relevance(resnet, [(x[:2], y[:2]), (x[2:], y[2:])])
    assert whole.keys() == parts.keys() and len(whole) == 8
    for key, value in whole.items():
        assert torch.allclose(value, parts[key], rtol=1e-4, atol=1e-6)


def test_permuted_units_have_permuted_scores_and_scale_is_no_matter(resnet):
    x, y = pictures()
    order, scale = torch.randperm(16), torch.rand(16) * 4 + 0.5
    other = copy.deepcopy(resnet)
    block = other.layer1[0]
    with torch.no_grad():
        block.conv1.weight.copy_(block.conv1.weight[order])
        for name in ("weight", "bias", "running_mean", "running_var"):
            tensor = getattr(block.bn1, name)
            tensor.copy_(tensor[order])
        block.bn1.weight.mul_(scale)
        block.bn1.bias.mul_(scale)
        block.conv2.weight.copy_(block.conv2.weight[:, order] / scale[None, :, None, None])
    assert torch.allclose(resnet(x), other(x), atol=1e-4)
    first, second = (filter_relevance(net, [(x, y)]) for net in (resnet, other))
    key = ("layer1.0.conv1.weight", 16)
    assert torch.allclose(first[key][order], second[key], rtol=1e-3, atol=1e-6)
    assert first[key].std() > 1e-3


def test_a_dead_filter_has_none_and_leaves_first(resnet):
    x, y = pictures()
    net = copy.deepcopy(resnet)
    with torch.no_grad():
        net.layer2[0].bn1.weight[7] = 0
        net.layer2[0].bn1.bias[7] = -1
    relevance = filter_relevance(net, [(x, y)])["layer2.0.conv1.weight", 32]
    assert relevance[7] == 0 and (relevance > 0).sum() == 31
    pruned = secateur.prune(net, x[:1], method="lrp-pruning", target="97%", data=(x, y))
    scores = pruned.scores["layer2.0:channels"]
    assert scores[7] == 0 and scores.argmin() == 7 and 7 not in pruned.plan.keep["layer2.0:channels"]


def test_tied_embeddings_and_next_tokens(tiny_llama):
    model = tiny_llama(tie_word_embeddings=True)
    ids = torch.randint(0, 64, (2, 8))
    relevance = filter_relevance(model, [ids])
    assert relevance["model.embed_tokens.weight", 32].shape == (32,)
    assert relevance["model.embed_tokens.weight", 64].sum().item() == pytest.approx(2, abs=1e-5)
    assert ("model.layers.0.self_attn.q_proj.weight", 32) not in relevance
    followed = torch.zeros(64, dtype=torch.float64)
    followed.index_add_(0, ids[:, 1:].flatten(), torch.full((14,), 1 / 7, dtype=torch.float64))
    assert torch.allclose(relevance["lm_head.weight", 64], followed, atol=1e-6)


def test_the_start_is_one_for_each_sample():
    logits = torch.tensor([[[1.0, 2.0], [3.0, 4.0]], [[5.0, 6.0], [7.0, 8.0]]])
    labels = torch.tensor([[0, 1], [1, -100]])
    expected = torch.tensor([[[0.5, 0], [0, 0.5]], [[0, 1.0], [0, 0]]])
    assert torch.equal(right_class(logits, labels), expected)
    assert torch.equal(right_class(logits, labels, "logit"), expected * logits)


@pytest.mark.parametrize(
    ("labels", "match"),
    [
        (None, "no labels"),
        (torch.tensor([0, 1, 2, 3, 4, 10]), "10 classes"),
        (torch.tensor([0, 1, 2, 3, 4, -3]), "from -3"),
        (torch.rand(6), "no classes"),
    ],
)
def test_labels_that_are_none_are_named_and_the_model_stays(resnet, labels, match):
    x, _ = pictures()
    before = {name: tensor.clone() for name, tensor in resnet.state_dict().items()}
    data = [x] if labels is None else [(x, labels)]
    with pytest.raises(SecateurError, match=match):
        secateur.prune(resnet, x[:1], method="lrp-pruning", target="50%", data=data)
    assert all(torch.equal(before[n], t) for n, t in resnet.state_dict().items())


def test_a_class_without_samples_is_told(resnet):
    x, y = pictures(12)
    settings = {"method": "lrp-pruning", "target": "90%"}
    assert not secateur.prune(resnet, x[:1], data=(x, y), **settings).plan.notes
    pruned = secateur.prune(resnet, x[:1], data=(x[:8], y[:8]), **settings)
    assert "no sample of classes 8, 9" in pruned.plan.notes["classes"]
    assert any("no sample of classes 8, 9" in note for note in pruned.report["notes"])


def circles(count, generator):
    angle = torch.rand(2, count, generator=generator) * 2 * math.pi
    radius = torch.tensor([1.0, 0.3])[:, None]
    points = torch.stack([radius * angle.cos(), radius * angle.sin()], -1)
    points = points + 0.1 * torch.randn(points.shape, generator=generator)
    return points.reshape(-1, 2), torch.arange(2).repeat_interleave(count)


def test_on_two_circles_it_beats_taylor_and_weight_with_twenty_samples_a_class():
    """One third of the hidden units at once, width 256: 99.8 against 91.7 and 84.9 in the sheet (10 seeds)."""
    found = {"lrp": [], "taylor": [], "weight": []}
    for seed in range(2):
        torch.manual_seed(seed)
        generator = torch.Generator().manual_seed(seed)
        x, y = circles(500, generator)
        net = nn.Sequential(
            nn.Linear(2, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 2)
        )  # fmt: skip
        optimiser = torch.optim.Adam(net.parameters(), 1e-3)
        for _ in range(300):
            batch = torch.randint(0, 1000, (200,), generator=generator)
            optimiser.zero_grad()
            F.cross_entropy(net(x[batch]), y[batch]).backward()
            optimiser.step()
        net.eval()
        taken = torch.cat([torch.randperm(500, generator=generator)[:20] + 500 * c for c in (0, 1)])
        data = (x[taken], y[taken])

        def accuracy(model, x=x, y=y):
            return (model(x).argmax(1) == y).float().mean().item() * 100

        assert accuracy(net) > 99
        pruned = secateur.prune(net, x[:1], method="lrp-pruning", target=2 / 3, data=data)
        found["lrp"].append(accuracy(pruned.model))
        layers, outputs = [net[0], net[2], net[4]], []
        hooks = [m.register_forward_hook(lambda m, i, o, seen=outputs: seen.append(o)) for m in layers]
        loss = F.cross_entropy(net(data[0]), data[1])
        grads = torch.autograd.grad(loss, outputs)
        for hook in hooks:
            hook.remove()
        taylor = [(o * g).mean(0).abs() for o, g in zip(outputs, grads)]
        for name, scores in (
            ("taylor", [s / s.norm() for s in taylor]),
            ("weight", [m.weight.abs().sum(1) / m.weight.abs().sum(1).sum() for m in layers]),
        ):
            masked = copy.deepcopy(net)
            gone = torch.zeros(768, dtype=torch.bool)
            gone[torch.cat(scores).argsort()[:256]] = True
            with torch.no_grad():
                for m, g in zip([masked[0], masked[2], masked[4]], gone.split(256)):
                    m.weight[g], m.bias[g] = 0, 0
            found[name].append(accuracy(masked))
    mean = {name: sum(values) / len(values) for name, values in found.items()}
    assert mean["lrp"] >= 99 and mean["lrp"] > mean["taylor"] and mean["lrp"] > mean["weight"], found
