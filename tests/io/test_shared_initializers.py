"""Freshly built networks: exporters store their equal scales, zeros and norms once, and one layer must be cut alone."""

from collections import Counter

import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import secateur
from secateur.graph import trace
from secateur.io.exchange import load_file
from secateur.surgery import cut_units


class Block(nn.Module):
    """A norm of ones, a scale of rank 3, a last convolution of zeros: the same numbers in every block."""

    def __init__(self):
        super().__init__()
        self.norm, self.wide = nn.GroupNorm(1, 8), nn.Conv2d(8, 16, 1)
        self.inner, self.scale = nn.BatchNorm2d(16), nn.Parameter(torch.full((16, 1, 1), 0.5))
        self.last = nn.Conv2d(16, 8, 1)
        nn.init.zeros_(self.wide.bias)
        nn.init.constant_(self.last.weight, 0.01)

    def forward(self, x):
        return x + self.last(self.inner(self.wide(self.norm(x))).relu() * self.scale)


class Fresh(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.blocks, self.head = (
            nn.Conv2d(3, 8, 1),
            nn.Sequential(Block(), Block()),
            nn.Conv2d(8, 2, 1),
        )

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)))


@pytest.fixture(scope="module", params=[True, False], ids=["dynamo", "torchscript"])
def file(request, tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("fresh") / "fresh.onnx"
    model, x = Fresh().eval(), torch.randn(2, 3, 4, 4)
    settings = {"training": torch.onnx.TrainingMode.PRESERVE, "do_constant_folding": False}
    with pytest.warns() if not request.param else torch.no_grad():
        torch.onnx.export(model, (x,), str(path), dynamo=request.param, **({} if request.param else settings))
    return path, x


def shared(path):
    """Initialisers that several nodes read, with their number of sizes above one."""
    graph = onnx.load(path).graph
    uses = Counter(name for node in graph.node for name in node.input)
    return {t.name: sum(n > 1 for n in t.dims) for t in graph.initializer if uses[t.name] > 1}


def test_blocks_of_equal_numbers_are_cut_apart(file, tmp_path):
    path, x = file
    assert max(shared(path).values()) == 2, "the exporter no longer shares: make another example"
    model = load_file(path)
    graph = trace(model, (x,))
    first, second = (g for g in graph.prunable() if g.size == 16)
    before = onnxruntime.InferenceSession(path).run(None, {model.specs[0].name: x.numpy()})[0]
    torch.testing.assert_close(model(x), torch.tensor(before), rtol=0, atol=1e-5)
    cut_units(model, graph, {first.name: torch.arange(5)})
    sizes = sorted(p.shape[0] for p in model.parameters() if p.dim() == 4 and p.shape[1] == 8 and len(p) > 2)
    assert sizes == [5, 16], f"{second.name} was cut as well"
    secateur.export(model, (x,), tmp_path / "out.onnx")  # what it writes is run in onnxruntime and compared
    again = load_file(tmp_path / "out.onnx")
    torch.testing.assert_close(again(x), model(x), rtol=0, atol=1e-6)


def test_a_matrix_that_two_nodes_read_stays_one(tmp_path):
    weight = onnx.numpy_helper.from_array(torch.randn(4, 4).numpy(), "w")
    nodes = [onnx.helper.make_node("MatMul", [a, "w"], [b]) for a, b in (("x", "h"), ("h", "y"))]
    value = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [2, 4]) for name in "xy"]
    graph = onnx.helper.make_graph(nodes, "tied", value[:1], value[1:], [weight])
    path = tmp_path / "tied.onnx"
    onnx.save(
        onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=9), path
    )
    assert [tuple(p.shape) for p in load_file(path).parameters()] == [(4, 4)]


def test_a_fresh_network_comes_out_at_half_the_macs(file, tmp_path):
    path, x = file
    pruned = secateur.prune(load_file(path), (x,), method="group-magnitude", target="macs<=50%")
    assert pruned.report["met"]
    secateur.export(pruned.model, (x,), tmp_path / "half.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "half.onnx")
    assert session.run(None, {session.get_inputs()[0].name: x.numpy()})[0].shape == (2, 2, 4, 4)
