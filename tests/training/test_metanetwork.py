"""Message passing, the penalty and its gradient: the worked examples of the sheet `metapruning`, (a) to (d)."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from secateur import SecateurError
from secateur.graph import trace
from secateur.graph.network import network
from secateur.pruning.target import parse_target
from secateur.tasks.networks.digits_cnn import DigitsCnn
from secateur.tasks.networks.digits_resnet import DigitsResNet
from secateur.training.job import Job
from secateur.training.metanetwork import (
    MetaNetwork,
    Round,
    gather,
    load_metanetwork,
    save_metanetwork,
    tensors_of,
    widths_of,
)
from secateur.training.metatraining import (
    GroupNorm,
    MetaLoss,
    data_model,
    importance,
    shrinkage,
    strengths,
)
from secateur.training.recipe import Recipe
from secateur.training.task import Task

PICTURE = torch.zeros(2, 1, 8, 8)


class Small(nn.Module):
    """Two convolutions with norms, a head."""

    def __init__(self, first=4, second=5, kernel=3):
        super().__init__()
        self.one, self.norm1 = nn.Conv2d(1, first, kernel, bias=False), nn.BatchNorm2d(first)
        self.two, self.norm2 = nn.Conv2d(first, second, 3), nn.BatchNorm2d(second)
        self.head = nn.Linear(second, 3)

    def forward(self, x):
        x = F.relu(self.norm1(self.one(x)))
        return self.head(F.relu(self.norm2(self.two(x))).mean((2, 3)))


def small(**sizes):
    """With statistics and scales that differ from those of a new norm."""
    torch.manual_seed(3)
    model = Small(**sizes)
    with torch.no_grad():
        for name, tensor in tensors_of(model).items():
            if "norm" in name and tensor.is_floating_point():
                tensor.uniform_(0.5, 1.5)
    return model.eval()


def metanetwork(model, **settings):
    torch.manual_seed(1)
    return MetaNetwork(network(model, PICTURE).form, **{"hidden": 8, "layers": 2, "ratio": 0.1, **settings})


def test_messages_of_the_sheet():
    """(a): f's that change nothing; two edges into the third node, and the signs of the reversed edges."""
    x = torch.tensor([[1.0, 2], [3, -1], [0.5, 1]])
    source, target = torch.tensor([0, 1]), torch.tensor([2, 2])
    edges = torch.tensor([[1.0, 1], [2, 0.5]])
    messages = x[target] * x[source] * edges
    assert messages.tolist() == [[0.5, 2], [3, -0.5]]
    found = gather(messages, target, 3)
    assert found[2].tolist() == [1.75, 0.75, 1.25, 1.25, 3, 2, 0.5, -0.5]
    assert not found[:2].any()
    assert (Round(2).sign * edges).tolist() == [[1, -1], [2, -0.5]]


def test_a_deviation_of_nothing_is_zero_and_has_a_finite_gradient():
    messages = torch.tensor([[1.0], [1.0], [2.0]], requires_grad=True)
    found = gather(messages, torch.tensor([0, 0, 1]), 2)
    assert found[:, 1].tolist() == [0, 0]
    found.sum().backward()
    assert torch.isfinite(messages.grad).all()


def test_strengths_of_the_sheet():
    """(b): importances 4, 9, 1, 16; the smallest shrinks 16 times as strongly as the largest."""
    score = torch.tensor([4.0, 9, 1, 16]) / 16
    assert torch.allclose(score.sqrt(), torch.tensor([0.5, 0.75, 0.25, 1]))
    assert torch.allclose(strengths(score, 16), torch.tensor([6.3496, 2.5198, 16, 1]), atol=1e-4)
    assert strengths(torch.ones(4), 16) is None


def test_importance_counts_rows_columns_and_scales():
    model = small()
    group = trace(model, PICTURE).prunable("channels")[0]
    by_hand = (
        model.one.weight.square().sum((1, 2, 3))
        + model.norm1.weight.square()
        + model.two.weight.square().sum((0, 2, 3))
    ) / 3
    found = importance(group, tensors_of(model))
    assert torch.allclose(found.float(), by_hand / by_hand.max(), atol=1e-6) and found.max() == 1


def test_equal_importance_shrinks_nothing():
    model = small()
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(1.0)
    assert not shrinkage(trace(model, PICTURE).prunable("channels"), tensors_of(model), 16, 0.1)


def test_no_ratio_changes_nothing_and_links_never_do():
    """(c): ratio 0 is the same network; so are statistics and what isn't in the graph."""
    for model in (small(), DigitsResNet().eval()):
        graph = network(model, PICTURE)
        before = {name: t.clone() for name, t in tensors_of(model).items()}
        metanetwork(model, ratio=0.0).transform(model, graph)
        assert all(torch.equal(t, before[name]) for name, t in tensors_of(model).items())
        metanetwork(model, ratio=0.1).transform(model, graph)
        for name, tensor in tensors_of(model).items():
            same = "running" in name or "num_batches" in name
            assert torch.equal(tensor, before[name]) == same, name


def test_permuted_channels_give_the_permuted_answer():
    """(c): equivariance, with two orders of the channels between the convolutions."""
    model, order = small(), torch.tensor([2, 0, 3, 1])
    graph, meta = network(model, PICTURE), metanetwork(model)
    own = {name: t.detach().clone() for name, t in tensors_of(model).items()}

    def permuted(tensors):
        found = dict(tensors)
        for name in tensors:
            if name.startswith(("one.", "norm1.")) and tensors[name].dim():
                found[name] = tensors[name][order]
        found["two.weight"] = tensors["two.weight"][:, order]
        return found

    with torch.no_grad():
        first, second = meta.generate(graph, own), meta.generate(graph, permuted(own))
    expected = permuted(first)
    assert all(torch.allclose(second[name], expected[name], atol=1e-6) for name in second)
    assert not torch.allclose(second["one.weight"], first["one.weight"], atol=1e-4)


def job_of(model, count=24, batch=8):
    generator = torch.Generator().manual_seed(5)
    data = torch.randn(count, 1, 8, 8, generator=generator), torch.arange(count) % 3
    task = Task("noise", lambda: model, data, inputs=PICTURE)
    return Job(model, task, GroupNorm(), parse_target("50%"), 4, Recipe(batch=batch), inputs=PICTURE)


def test_injected_gradients_are_those_of_loss_and_penalty():
    """(d): against autograd through `torch.func.functional_call`, with the strengths as constants."""
    model = small()
    job, meta, reg, alpha = job_of(model), metanetwork(model), 0.3, 16
    data = data_model(model, PICTURE)
    before = {name: t.clone() for name, t in tensors_of(model).items()}
    MetaLoss(job, [data], alpha, reg)(meta, torch.tensor([0])).backward()
    found = {name: p.grad.clone() for name, p in meta.named_parameters() if p.grad is not None}
    assert all(torch.equal(t, before[name]) for name, t in tensors_of(model).items())

    meta.zero_grad()
    made = meta.generate(data.graph, data.tensors)
    x, y = job.task.train
    logits = torch.func.functional_call(model.eval(), {**data.tensors, **made}, (x,))
    total = F.cross_entropy(logits, y)
    penalty = 0
    rows = {  # what leaves with each channel, of the weights that were made
        "one": [
            made["one.weight"].flatten(1),
            made["norm1.weight"][:, None],
            made["two.weight"].transpose(0, 1).flatten(1),
        ],
        "two": [made["two.weight"].flatten(1), made["norm2.weight"][:, None], made["head.weight"].t()],
    }
    for parts in rows.values():
        size = torch.stack([part.detach().square().sum(1) for part in parts]).mean(0).sqrt()
        size = size / size.max()
        strength = alpha ** ((1 - size) / (1 - size.min()))
        penalty = penalty + sum((strength * part.square().sum(1)).sum() for part in parts)
    (total + reg / 2 * penalty).backward()
    assert len(found) > 20
    for name, p in meta.named_parameters():
        if p.grad is not None:
            assert torch.allclose(found[name], p.grad, atol=1e-5, rtol=1e-3), name


def test_a_step_against_the_gradient_lowers_loss_and_penalty():
    model = small()
    job, data = job_of(model), data_model(model, PICTURE)
    meta, loss = metanetwork(model), MetaLoss(job, [data], 16, 0.1)
    optimizer = torch.optim.SGD(meta.parameters(), 0.05)
    found = []
    for _ in range(4):
        value = loss(meta, torch.tensor([0]))
        optimizer.zero_grad()
        value.backward()
        made = meta.generate(data.graph, data.tensors)
        penalty = sum((made[n].detach() * g).sum() for n, g in shrinkage(data.groups, made, 16, 0.1).items())
        found.append(float(value.detach() + penalty / 2))
        optimizer.step()
    assert found[-1] < found[0]


def test_kernels_of_several_sizes_and_what_they_are_laid_in():
    assert widths_of({"kernels": [["a", 9], ["b", 1], ["c", 9]]}) == (9,)
    assert widths_of({"kernels": [["a", 49], ["b", 1], ["c", 9]]}) == (9, 49)
    assert widths_of({"kernels": [["a", 256], ["b", 1]]}) == (1, 256)
    meta = MetaNetwork({"kernels": [["a", 9], ["b", 1]]}, hidden=4, layers=1)
    laid = meta.pad(torch.tensor([[7.0]]))
    assert laid.tolist() == [[0, 0, 0, 0, 7, 0, 0, 0, 0]] and meta.middle(laid, 1).tolist() == [[7]]


def test_saved_and_loaded(tmp_path):
    model = small()
    meta = metanetwork(model)
    save_metanetwork(meta, tmp_path / "meta", {"task": "noise"})
    assert sorted(p.name for p in (tmp_path / "meta").iterdir()) == ["metanetwork.json", "model.safetensors"]
    again = load_metanetwork(tmp_path / "meta")
    again.check(network(model, PICTURE))
    own = tensors_of(model)
    with torch.no_grad():
        one, two = (m.generate(network(model, PICTURE), own) for m in (meta, again))
    assert all(torch.equal(one[name], two[name]) for name in one)
    with pytest.raises(SecateurError, match="not empty"):
        save_metanetwork(meta, tmp_path / "meta")
    (tmp_path / "meta" / "model.safetensors").write_bytes(b"x")
    with pytest.raises(SecateurError, match="don't fit"):
        load_metanetwork(tmp_path / "meta")
    (tmp_path / "meta" / "metanetwork.json").write_text(json.dumps({"format": "another"}))
    with pytest.raises(SecateurError, match="format is 'another'"):
        load_metanetwork(tmp_path / "meta")
    with pytest.raises(SecateurError, match=r"no metanetwork\.json"):
        load_metanetwork(tmp_path / "none")


def test_other_architectures_and_wider_kernels_are_refused():
    model, meta = small(), metanetwork(small())
    meta.check(network(small(first=7, second=3), PICTURE))  # other widths are the same architecture
    with pytest.raises(SecateurError, match="kernels of 25 values, and it was trained for 9 at most"):
        meta.check(network(small(kernel=5), PICTURE))
    with pytest.raises(SecateurError, match="trained for another architecture: kernels differ, first"):
        meta.transform(DigitsCnn(), network(DigitsCnn(), PICTURE))
    models = [data_model(m, PICTURE) for m in (model, DigitsCnn().eval())]
    with pytest.raises(SecateurError, match="data model 1 is of another architecture"):
        MetaLoss(job_of(model), models, 16, 0.1)
