"""A network as a graph of channels and kernels, from what its trace saw, and the way back.

Every channel that a layer makes is a node, and so is each input; every kernel between two channels is an edge. Which
channels a layer reads is known by their labels, and by the order in which the layers ran: those of the last layer that
made channels of these labels. Spec: metapruning (arXiv 2506.12041).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from secateur.errors import SecateurError
from secateur.graph.build import build_graph
from secateur.graph.notes import Layer
from secateur.graph.trace import _ran
from secateur.graph.tracer import Tracer
from secateur.utils.screen import Screen

FEATURES = ("scale", "shift", "mean", "var", "bias")
"""What is known of a node: the norm behind the channel, and the bias of the layer that makes it."""
MISSING = (1.0, 0.0, 0.0, 1.0, 0.0)
"""The features of a channel without norm and bias."""
WRITTEN = ("scale", "shift", "bias")
"""Features that go back into the network; statistics stay what they are."""


@dataclass(repr=False)
class Kernels(Screen):
    """Edges of one weight: `places[e]` are the places of the e-th kernel in the flat tensor, [edges, values]."""

    name: str
    places: Tensor


@dataclass(repr=False)
class Vectors(Screen):
    """A feature of nodes that is one tensor: entry k of it belongs to `nodes[k]`."""

    feature: str
    name: str
    nodes: Tensor


@dataclass(repr=False)
class Network(Screen):
    """Nodes, edges and where their numbers lie in the model's tensors.

    >>> graph = network(nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)), torch.zeros(2, 1, 5, 5))
    >>> graph.nodes, len(graph.source), [(k.name, tuple(k.places.shape)) for k in graph.kernels]
    (5, 4, [('0.weight', (4, 9))])

    source, target: int64 [edges]; the edges of `kernels` come first, in their order, then `links`: channels that meet
    element by element (a residual, queries and keys), which have no parameters. left: parameters that the graph doesn't
    hold, which stay as they are.
    """

    nodes: int
    source: Tensor
    target: Tensor
    kernels: list[Kernels]
    links: int
    vectors: list[Vectors]
    left: tuple[str, ...]
    shapes: dict[str, tuple[int, ...]]
    _order: dict[str, Tensor] = field(default_factory=dict)

    @property
    def form(self) -> dict[str, Any]:
        """The architecture without its widths, as plain data: networks that differ only in channels are equal here."""
        blocks = {name: 0 for name in dict.fromkeys(k.name for k in self.kernels)}
        for k in self.kernels:
            blocks[k.name] = max(blocks[k.name], k.places.shape[1])
        return {
            "kernels": [list(item) for item in blocks.items()],
            "vectors": [[v.feature, v.name] for v in self.vectors],
        }

    def read(self, tensors: Mapping[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
        """(node features [nodes, 5], kernels [edges, values] of each of `kernels`), float32."""
        nodes = torch.tensor(MISSING, device=self._device(tensors)).repeat(self.nodes, 1)
        for v in self.vectors:
            nodes[v.nodes.to(nodes.device), FEATURES.index(v.feature)] = tensors[v.name].detach().float()
        edges = [
            tensors[k.name].detach().float().reshape(-1)[k.places.to(nodes.device)] for k in self.kernels
        ]
        return nodes, edges

    def write(
        self, nodes: Tensor, edges: Sequence[Tensor], like: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """The parameters that these features say, by name; differentiable. like: gives their dtypes, else float32.

        Running statistics and links are no parameters: what became of them is passed over.
        """
        found = {
            v.name: nodes[v.nodes.to(nodes.device), FEATURES.index(v.feature)]
            for v in self.vectors
            if v.feature in WRITTEN
        }
        flat: dict[str, list[Tensor]] = {}
        for kernels, values in zip(self.kernels, edges, strict=True):
            flat.setdefault(kernels.name, []).append(values.reshape(-1))
        for name, parts in flat.items():
            if name not in self._order:
                places = torch.cat([k.places.reshape(-1) for k in self.kernels if k.name == name])
                self._order[name] = places.argsort().to(nodes.device)
            found[name] = torch.cat(parts)[self._order[name]].reshape(self.shapes[name])
        return {name: value.to(like[name].dtype) if like else value for name, value in found.items()}

    def _device(self, tensors: Mapping[str, Tensor]) -> torch.device:
        return tensors[self.kernels[0].name].device


def network(model: nn.Module, inputs: Any) -> Network:
    """A model as a graph of its channels and kernels; `inputs` as `trace` takes them.

    >>> graph = network(model, images)  # doctest: +SKIP
    >>> tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}  # doctest: +SKIP
    >>> same = graph.write(*graph.read(tensors))  # doctest: +SKIP

    Convolutions (grouped and transposed too), matrix products with a weight, norms, scales and shifts of channels, in any
    order; residuals, attention and products of activations are links. Where several channels share a label (the heads of
    attention), their order tells them apart. Embeddings, positions and what no layer reads stay outside (`left`).

    Raises SecateurError, with the reason, where a weight can't be said so: an operation without a rule, a weight that is
    computed (weight norm), used twice, or of an operation of another kind (recurrent layers, stacked experts).
    """
    tracer, outputs = _ran(model, [inputs], inner=True)
    graph = build_graph(tracer, outputs)
    for name, why in tracer.notes.unknown.items():
        raise _refused(f"operation without a rule: {name}: {why}", type(model).__name__)
    return _Builder(tracer, graph._class).build()


def _refused(what: str, where: str) -> SecateurError:
    return SecateurError(
        what, where=where, fix="a graph of channels and kernels can't say this; take a method that needs none"
    )


class _Builder:
    """The nodes and edges so far, in the order of the run."""

    def __init__(self, tracer: Tracer, classes: np.ndarray):
        self.tracer, self.classes = tracer, classes
        self.nodes = 0
        self.made: dict[int, list[int]] = {}  # class -> the nodes that the last layer made of it
        self.shown: dict[int, list[int]] = {}  # the same, behind a norm with nodes of its own
        self.taken: set[tuple[int, str]] = set()
        self.source: list[np.ndarray] = []
        self.target: list[np.ndarray] = []
        self.kernels: list[Kernels] = []
        self.links: list[tuple[int, int]] = []
        self.vectors: list[Vectors] = []
        self.used: set[str] = set()
        self.fresh = -1

    def build(self) -> Network:
        for layer in self.tracer.notes.layers:
            names = [name for part, name in layer.tensors.items()]
            if "" in names:
                raise _refused(
                    f"its {_first(layer, '')} is computed, not a parameter", layer.module or "model"
                )
            if again := next((name for name in names if name in self.used), None):
                raise _refused("it is used twice", again)
            self.used.update(names)
            if "weight" in layer.tensors:
                self.weight(layer)
            else:
                self.norm(layer)
        return self.finished()

    def finished(self) -> Network:
        shapes = {name: tuple(p.shape) for name, p in self.tracer.parameters}
        own = [n for n in shapes if n not in self.tracer.aliases]
        left = [name for name in own if name not in self.used]
        for name in left:
            roles = {self.tracer.notes.roles.get((name, d)) for d in range(len(shapes[name]))}
            if {"out", "in"} <= roles:
                raise _refused("the operation that reads it isn't a convolution or a matrix product", name)
        if not self.kernels:
            raise _refused(
                "no convolution or matrix product has a weight here", type(self.tracer.model).__name__
            )
        pairs = sorted(set(self.links))
        ends = [np.array([p[k] for p in pairs], np.int64) for k in (0, 1)]
        return Network(
            self.nodes,
            torch.from_numpy(np.concatenate([*self.source, ends[0]])),
            torch.from_numpy(np.concatenate([*self.target, ends[1]])),
            self.kernels,
            len(pairs),
            self.vectors,
            tuple(left),
            {k.name: shapes[k.name] for k in self.kernels},
        )

    def axis(self, name: str, dim: int, size: int) -> list[int]:
        """The classes along an axis of a tensor; an axis of size one has no labels, and a class of its own."""
        ids = self.tracer.ids.get((name, dim))
        if ids is not None:
            return self.classes[ids].tolist()
        self.fresh -= 1
        return [self.fresh] * size

    def add(self, count: int) -> list[int]:
        self.nodes += count
        return list(range(self.nodes - count, self.nodes))

    def weight(self, layer: Layer) -> None:
        name = layer.tensors["weight"]
        value = self.tracer.model.get_parameter(name)
        if value.dim() < 2:
            raise _refused("it is a weight of one axis", name)
        out, into = layer.dims
        places = np.arange(value.numel()).reshape(value.shape)
        places = np.moveaxis(places, (out, into), (0, 1)).reshape(value.shape[out], value.shape[into], -1)
        if layer.transposed and layer.groups > 1:  # [out / groups, in] -> [out, in / groups]
            per = places.shape[0]
            places = np.concatenate(np.split(places, layer.groups, axis=1))
            outs = [c for _ in range(layer.groups) for c in self.axis(name, out, per)]
        else:
            outs = self.axis(name, out, value.shape[out])
        groups, width = layer.groups, places.shape[1]
        if layer.reads is not None and len(layer.reads) == groups * width:
            ins = self.classes[layer.reads].tolist()
        else:
            ins = list(chain.from_iterable(self.axis(name, into, width) for _ in range(groups)))
            if groups > 1:  # nothing is known of what it reads: every channel is an input of its own
                self.fresh -= len(ins)
                ins = list(range(self.fresh, self.fresh + len(ins)))
        sources = self.sources(ins)
        nodes = self.add(len(outs))
        share = len(outs) // groups
        self.edges(
            name, places, np.array(sources).reshape(groups, width), np.array(nodes).reshape(groups, share)
        )
        self.produce(outs, nodes)
        if bias := layer.tensors.get("bias"):
            self.vectors.append(Vectors("bias", bias, torch.tensor(nodes)))

    def edges(self, name: str, places: np.ndarray, sources: np.ndarray, nodes: np.ndarray) -> None:
        """The kernels of a weight, [out, in / groups, values], by how many columns each source has."""
        share = nodes.shape[1]
        found: dict[int, list[tuple[np.ndarray, np.ndarray, np.ndarray]]] = {}
        for group, (read, made) in enumerate(zip(sources, nodes, strict=True)):
            rows = places[group * share : (group + 1) * share]
            each, inverse, counts = np.unique(read, return_inverse=True, return_counts=True)
            columns = np.argsort(inverse, kind="stable")
            starts = np.cumsum(counts) - counts
            for count in np.unique(counts).tolist():
                mine = np.flatnonzero(counts == count)
                take = columns[starts[mine][:, None] + np.arange(count)]  # [sources, columns of each]
                kernels = rows[:, take].reshape(share * len(mine), -1)
                ends = np.tile(each[mine], share), np.repeat(made, len(mine))
                found.setdefault(kernels.shape[1], []).append((kernels, *ends))
        for parts in found.values():
            kernels, source, target = (np.concatenate(column) for column in zip(*parts, strict=True))
            self.kernels.append(Kernels(name, torch.from_numpy(kernels.astype(np.int64))))
            self.source.append(source.astype(np.int64))
            self.target.append(target.astype(np.int64))

    def sources(self, classes: Sequence[int], raw: bool = False) -> list[int]:
        """The node that each of these channels comes from; channels that no layer made are inputs."""
        places: dict[int, list[int]] = {}
        for position, label in enumerate(classes):
            places.setdefault(label, []).append(position)
        found = [0] * len(classes)
        for label, positions in places.items():
            nodes = self.made.get(label) if raw else self.shown.get(label, self.made.get(label))
            if nodes is None:
                nodes = self.made[label] = self.add(len(positions))
            for k, position in enumerate(positions):
                found[position] = self.matched(nodes, len(positions))[k]
        return found

    def matched(self, nodes: list[int], count: int) -> list[int]:
        """`count` channels of one label as nodes: in their order, several in a row of each; of several chunks the last."""
        if count % len(nodes) == 0:
            return [node for node in nodes for _ in range(count // len(nodes))]
        if len(nodes) % count == 0:  # chunks that met, as the gate of a gated layer and what it multiplies
            self.links += list(zip(nodes[:-count], nodes[count:], strict=True))
            return nodes[-count:]
        return [nodes[k * len(nodes) // count] for k in range(count)]

    def produce(self, classes: Sequence[int], nodes: Sequence[int]) -> None:
        """These nodes are now the channels of their labels; what was there before meets them."""
        mine: dict[int, list[int]] = {}
        for label, node in zip(classes, nodes, strict=True):
            mine.setdefault(label, []).append(node)
        for label, new in mine.items():
            old = self.made.get(label, [])
            count = max(len(old), len(new)) if old else 0
            self.links += [(old[k * len(old) // count], new[k * len(new) // count]) for k in range(count)]
            self.made[label] = new
            self.shown.pop(label, None)

    def norm(self, layer: Layer) -> None:
        """Features of the nodes that the channels come from, where these are free; else nodes behind them."""
        name = next(iter(layer.tensors.values()))
        shape = self.tracer.own[name].shape
        if len(shape) != 1:
            self.used -= set(layer.tensors.values())  # a norm over places: left as it is
            return
        classes = self.axis(name, 0, shape[0])
        before = self.sources(classes, raw=True)
        nodes = before
        busy = any((node, feature) in self.taken for node in before for feature in layer.tensors)
        if busy or len(set(before)) < len(before):
            nodes = self.add(len(before))
            self.links += list(zip(before, nodes, strict=True))
            shown: dict[int, list[int]] = {}
            for label, node in zip(classes, nodes, strict=True):
                shown.setdefault(label, []).append(node)
            self.shown |= shown
        self.taken |= {(node, feature) for node in nodes for feature in layer.tensors}
        for feature, tensor in layer.tensors.items():
            self.vectors.append(Vectors(feature, tensor, torch.tensor(nodes)))


def _first(layer: Layer, name: str) -> str:
    return next(part for part, own in layer.tensors.items() if own == name)
