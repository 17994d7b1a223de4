"""Faults put into a cut, which the proof in little memory and time must see as the full one does."""

import importlib
import weakref
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from secateur.graph import trace
from secateur.surgery import prove

proof = importlib.import_module("secateur.surgery.prove")
PATH = Path(__file__).parents[2] / "benchmarks" / "architectures.py"
SPEC = importlib.util.spec_from_file_location("architectures", PATH)
architectures = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(architectures)

NAMES = ["timm:resnet10t", "timm:lcnet_035", "hf:llama", "hf:convnext", "hf:gpt2", "hf:mixtral"]


def build(name):
    if not name.startswith("timm:"):
        return architectures.build(name)
    return timm.create_model(name[5:]).eval(), torch.randn(1, 3, 96, 96)


def shifted(cut, name, dim):
    """A cut after which one tensor holds other units than it should: as many, each the next one."""

    def faulty(model, graph, keep):
        changes = cut(model, graph, keep)
        tensor = proof._tensor(model, name)
        path, _, leaf = name.rpartition(".")
        owner = model.get_submodule(path)
        wrong = tensor.detach().roll(1, dim)
        if leaf in owner._parameters:
            owner._parameters[leaf] = nn.Parameter(wrong)
        else:
            owner._buffers[leaf] = wrong
        return changes

    return faulty


@pytest.mark.parametrize("name", NAMES)
def test_a_wrong_index_a_wrong_norm_and_a_missed_consumer(name, monkeypatch):
    model, inputs = build(name)
    graph = trace(model, inputs)
    keep = {g.name: torch.arange(0, g.size, 2) for g in graph.prunable() if g.exact and g.kind != "layers"}
    assert proof.holds(model, graph, keep, inputs, (), True)
    slices = {
        (s.role, s.name.rpartition(".")[2]): (s.name, s.dim)
        for n in keep
        for s in graph[n].slices
        if s.name in graph.shapes
    }
    assert {role for role, _ in slices} >= {"out", "in"}
    for tensor, dim in sorted(slices.values())[:: max(1, len(slices) // 5)]:
        with monkeypatch.context() as patch:
            patch.setattr(proof, "cut_modules", shifted(proof.cut_modules, tensor, dim))
            assert not proof.holds(model, graph, keep, inputs, (), True), (tensor, dim)


@pytest.mark.parametrize("name", NAMES)
def test_a_slice_that_the_graph_lacks(name):
    model, inputs = build(name)
    graph = trace(model, inputs)
    for group in {g.kind: g for g in graph.prunable() if g.kind != "layers" and len(g.slices) > 1}.values():
        whole = group.slices
        for left in (whole[:-1], whole[1:]):
            group.slices = left
            keep = {group.name: torch.arange(0, group.size, 2)}
            assert not proof.holds(model, graph, keep, inputs, (), True), (group.name, whole[-1].name)
        group.slices = whole


def test_what_equal_entries_hide_is_reported(monkeypatch):
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
    x = torch.randn(2, 3, 4, 4)
    graph = trace(model, x)
    (group,) = graph.prunable()
    keep = {group.name: torch.tensor([1, 2, 6])}
    assert prove(model, graph, keep, x) == {}
    for tensor in ("1.weight", "1.running_var"):  # all ones
        with monkeypatch.context() as patch:
            patch.setattr(proof, "cut_modules", shifted(proof.cut_modules, tensor, 0))
            assert "differ" in prove(model, graph, keep, x)[group.name]


def test_the_model_is_left_as_it_was_and_no_second_one_is_made():
    model = timm.create_model("resnet10t").eval()
    x = torch.randn(1, 3, 96, 96)
    graph = trace(model, x)
    keep = {g.name: torch.arange(0, g.size, 2) for g in graph.prunable() if g.kind != "layers"}
    before = {n: t.clone() for n, t in model.state_dict().items()}
    one = sum(p.numel() for p in model.parameters())
    with Peak(model) as peak:
        assert proof.holds(model, graph, keep, x, (), True)
    assert peak.most < 4 * one  # beside the model itself: the cut copy, and what is alive while it runs
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


class Peak(torch.utils._python_dispatch.TorchDispatchMode):
    """Most bytes that were alive at once of all that operations made within, the model's own not counted."""

    def __init__(self, model):
        super().__init__()
        own = [t.untyped_storage() for t in model.state_dict().values()]
        self.alive, self.now, self.most = {storage._cdata: 0 for storage in own}, 0, 0
        self.own = own

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.alive:
                    self.alive[storage._cdata] = storage.nbytes()
                    self.now += storage.nbytes()
                    self.most = max(self.most, self.now)
                    weakref.finalize(storage, self._gone, storage._cdata)
        return out

    def _gone(self, key):
        self.now -= self.alive.pop(key, 0)
