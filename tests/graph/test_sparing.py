"""A trace that spares convolutions finds what one that computes them does, and gives up where values are looked at."""

import pytest
import torch
from torch import nn

from secateur.graph import trace
from secateur.graph.sparing import FEW


class Net(nn.Module):
    """Ten convolutions, then what a test wants to happen to their result."""

    def __init__(self, then=None):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 6, 3), *(nn.Conv2d(6, 6, 3, padding=1, bias=False) for _ in range(FEW + 1))
        )
        self.norm, self.head, self.other = nn.BatchNorm2d(6), nn.Linear(6, 4), nn.Linear(6, 4)
        self.register_buffer("seen", torch.zeros(6))
        self.count, self.then = nn.Buffer(torch.zeros(())), then
        self.table = torch.zeros(6)

    def forward(self, x):
        self.given = x
        x = torch.relu(self.norm(self.stem(x))) + 1
        values = x.mean((2, 3))
        if self.then is not None and self.then(self, values) is True:
            return self.other(values)
        return self.head(values)


def swallowed(net, v):
    try:
        return bool(v.sum() > 0)
    except Exception:  # noqa: BLE001  as users' code does
        return False


def counted(net, v):
    net.count += 1


def written(net, v):
    net.seen[:] = v[0]


def put_aside(net, v):
    net.table[:] = v[0]


def replaced(net, v):
    net.seen = v[0].clone()


def in_train_mode(net, v):
    nn.functional.batch_norm(v, net.norm.running_mean, net.norm.running_var, training=True)


LOOKS = {
    "a branch": lambda net, v: bool(v.sum() > 0),
    "a number": lambda net, v: v.sum().item() > 0,
    "a list": lambda net, v: v.tolist()[0][0] > 0,
    "numpy": lambda net, v: v.numpy().sum() > 0,
    "a size": lambda net, v: len(v[v > 0]) > 0,
    "an index": lambda net, v: v[:, v[0].argsort()] is not None,
    "equality": lambda net, v: not torch.equal(v, torch.zeros_like(v)),
    "a caught look": swallowed,
    "a count in place": counted,
    "a part of a buffer": written,
    "another buffer": replaced,
    "a tensor of its own": put_aside,
    "the input": lambda net, v: net.given.copy_(v.mean()) is None,
    "statistics": in_train_mode,
}  # fmt: skip


def told(graph):
    return (
        graph.explain(),
        graph.macs(),
        [[(s.name, s.dim, s.index.tolist()) for s in g.slices] for g in graph.groups],
    )


def spared(graph):
    return next(iter(graph._runs.values())).finite is None


def net_and_picture(then=None):
    torch.manual_seed(0)
    return Net(then).eval(), torch.randn(2, 3, 8, 8)


def test_convolutions_are_spared_and_the_graph_is_the_same():
    net, x = net_and_picture()
    graph, full = trace(net, x), trace(net, x, values=True)
    assert spared(graph) and not spared(full)
    assert told(graph) == told(full)
    assert "stem.0:channels" in graph.explain() or graph.prunable()


@pytest.mark.parametrize("look", LOOKS)
def test_who_looks_at_values_sees_them(look):
    """With zeros the other branch would be taken, and the model's state be another."""
    net, x = net_and_picture(LOOKS[look])
    full, same = net_and_picture(LOOKS[look])
    graph = trace(net, x)
    assert not spared(graph)
    assert told(graph) == told(trace(full, same, values=True))
    assert torch.equal(x, same) and torch.equal(net.table, full.table)
    for (name, made), wanted in zip(net.named_buffers(), full.buffers(), strict=True):
        assert torch.equal(made, wanted), name


def test_hooks_see_what_was_computed():
    net, x = net_and_picture()
    seen = []
    net.stem.register_forward_hook(lambda module, args, output: seen.append(output.clone()))
    graph = trace(net, x)
    with torch.no_grad():
        assert torch.allclose(seen[0], net.stem(x)) and not spared(graph)


def test_networks_with_few_convolutions_are_computed():
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Flatten(), nn.Linear(6, 2))
    assert not spared(trace(net, torch.zeros(2, 3, 3, 3)))


@pytest.mark.parametrize("kwargs", [
    {"stride": 2, "padding": 1}, {"dilation": 2, "padding": 3}, {"groups": 3}, {"stride": 3, "bias": False},
])  # fmt: skip
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_shapes_are_those_of_the_convolution(rank, kwargs):
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1]
    net = nn.Sequential(conv(6, 6, 3, **kwargs), *(conv(6, 6, 1) for _ in range(FEW)))
    graph = trace(net, torch.randn(2, 6, *(11, 12, 13)[:rank]))
    assert spared(graph)
    (run,) = graph._runs.values()
    assert run.shapes == [tuple(net(torch.randn(2, 6, *(11, 12, 13)[:rank])).shape)]


def test_what_is_no_plain_convolution_is_computed():
    """Transposed ones, and channels last, whose results would lie otherwise."""
    net = nn.Sequential(nn.ConvTranspose2d(6, 6, 3), *(nn.Conv2d(6, 6, 1) for _ in range(FEW))).to(
        memory_format=torch.channels_last
    )
    x = torch.randn(2, 6, 5, 5).to(memory_format=torch.channels_last)
    assert not spared(trace(net, x))


def test_a_model_that_fails_says_so():
    net, _ = net_and_picture()
    with pytest.raises(Exception, match="the model does not run on these inputs"):
        trace(net, torch.randn(2, 4, 8, 8))
