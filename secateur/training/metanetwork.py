"""A network that prepares networks: message passing over channels and kernels, and its files.

Liu, Wang, Zhang 2025, https://arxiv.org/abs/2506.12041. Spec: metapruning.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from secateur.errors import SecateurError
from secateur.graph.network import FEATURES, Network
from secateur.utils.files import atomic_directory, atomic_write_json, check_path
from secateur.utils.schema import read_object

FORMAT = "secateur metanetwork 1"
WIDE, MIDDLE = 64, 64
"""Kernels of more values than this are encoded and decoded through a layer of so many."""
LEAST = 1e-5
"""A variance up to this is none: its root has no gradient there."""


def gather(messages: Tensor, target: Tensor, count: int) -> Tensor:
    """Mean, population standard deviation, maximum and minimum of the messages into each node, [count, 4 d].

    >>> messages = torch.tensor([[0.5, 2.0], [3.0, -0.5]])
    >>> gather(messages, torch.tensor([2, 2]), 3)[2]
    tensor([ 1.7500,  0.7500,  1.2500,  1.2500,  3.0000,  2.0000,  0.5000, -0.5000])

    messages: [edges, d]; target: int64 [edges]. Zeros for a node without any.
    """
    order = target.argsort(stable=True)
    counts = torch.bincount(target, minlength=count)
    starts = counts.cumsum(0) - counts
    out = messages.new_zeros(count, 4 * messages.shape[1])
    for size in counts.unique().tolist():
        if size:
            nodes = (counts == size).nonzero().flatten()
            edges = order[starts[nodes][:, None] + torch.arange(size, device=order.device)]
            out = out.index_copy(0, nodes, _four(messages[edges]))
    return out


def _four(values: Tensor) -> Tensor:
    """[nodes, edges of each, d] -> [nodes, 4 d]."""
    mean = values.mean(1)
    variance = (values - mean[:, None]).square().mean(1)
    some = variance > LEAST
    deviation = torch.where(some, variance, 1.0).sqrt() * some
    return torch.cat([mean, deviation, values.amax(1), values.amin(1)], 1)


class Round(nn.Module):
    """One round of messages, along the edges and against them."""

    sign: Tensor

    def __init__(self, width: int):
        super().__init__()
        self.pieces = nn.ModuleList(nn.Sequential(nn.Linear(width, width), nn.SiLU()) for _ in range(4))
        self.merge = nn.Linear(4 * width, width)
        sign = torch.ones(width)
        sign[width // 2 :] = -1
        self.register_buffer("sign", sign, persistent=False)

    def forward(self, h: Tensor, e: Tensor, source: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """What joins the nodes [nodes, d], and the new edges [edges, d]; h is normed."""
        one, two, three, four = (piece(h) for piece in self.pieces)
        along = self.merge(gather(two[target] * one[source] * e, target, len(h)))
        against = self.merge(gather(two[source] * one[target] * (self.sign * e), source, len(h)))
        return along + against, e + (three[source] * four[target] + three[target] * four[source]) * e


class MetaNetwork(nn.Module):
    """Changes a network's kernels, scales, shifts and biases a little, by looking at all of it.

    >>> graph = network(model, images)  # doctest: +SKIP
    >>> meta = MetaNetwork(graph.form, hidden=32, layers=4)  # doctest: +SKIP
    >>> meta.transform(model, graph)  # doctest: +SKIP

    form: the architecture it is made for (`Network.form`): of any widths, of no other layers. hidden: features of a node or edge
    inside. layers: rounds of messages, each along the edges and against them. ratio: how much of its answer joins the weights.
    Kernels below 3 x 3 are laid in the middle of one where there are such.
    """

    def __init__(self, form: Mapping[str, Any], hidden: int = 32, layers: int = 4, ratio: float = 0.05):
        super().__init__()
        self.form, self.hidden, self.ratio = dict(form), hidden, ratio
        self.widths = widths_of(form)
        self.read_nodes = nn.Linear(len(FEATURES), hidden)
        self.read_edges = nn.ModuleDict({str(w): _reader(w, hidden) for w in self.widths})
        self.rounds = nn.ModuleList(Round(hidden) for _ in range(layers))
        self.write_nodes = _writer(len(FEATURES), hidden)
        self.write_edges = nn.ModuleDict({str(w): _writer(w, hidden) for w in self.widths})

    def forward(self, graph: Network, nodes: Tensor, edges: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Features as `Network.read` gives them, changed."""
        source, target = graph.source.to(nodes.device), graph.target.to(nodes.device)
        padded = [self.pad(values) for values in edges]
        link = self.pad(nodes.new_ones(1, 1)).expand(graph.links, -1)
        e = torch.cat([self.read_edges[str(v.shape[1])](v) for v in [*padded, link]])
        h = self.read_nodes(nodes)
        for each in self.rounds:
            more, e = each(self.normed(h), e, source, target)
            h = h + more
        nodes = nodes + self.ratio * self.write_nodes(self.normed(h))
        parts = self.normed(e).split([*map(len, edges), graph.links])
        changed = []
        for values, wide, hidden in zip(edges, padded, parts):
            answer = self.write_edges[str(wide.shape[1])](hidden)
            changed.append(values + self.ratio * self.middle(answer, values.shape[1]))
        return nodes, changed

    def normed(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, (self.hidden,))

    def pad(self, values: Tensor) -> Tensor:
        """Kernels in the middle of the narrowest width that they fit in."""
        count = values.shape[1]
        width = next(w for w in self.widths if w >= count)
        before = (width - count) // 2
        return F.pad(values, (before, width - count - before))

    def middle(self, values: Tensor, count: int) -> Tensor:
        before = (values.shape[1] - count) // 2
        return values[:, before : before + count]

    def check(self, graph: Network, where: str = "metanetwork") -> None:
        """Raises `SecateurError` where it wasn't made for this network."""
        widest = max(k.places.shape[1] for k in graph.kernels)
        if widest > self.widths[-1]:
            raise SecateurError(
                f"the network has kernels of {widest} values, and it was trained for {self.widths[-1]} at most",
                where=where,
                fix="train one for this network: secateur train metanetwork",
            )
        if graph.form != self.form:
            kind = next(kind for kind in self.form if graph.form[kind] != self.form[kind])
            mine, other = self.form[kind], graph.form[kind]
            first = next((m for m in other if m not in mine), None) or next(m for m in mine if m not in other)
            raise SecateurError(
                f"it was trained for another architecture: {kind} differ, first {first}",
                where=where,
                fix="train one for this network: secateur train metanetwork",
            )

    def generate(self, graph: Network, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The parameters that it makes of these tensors, by name; differentiable in its own parameters."""
        nodes, edges = self(graph, *graph.read(tensors))
        return graph.write(nodes, edges, like=tensors)

    @torch.no_grad()
    def transform(self, model: nn.Module, graph: Network) -> None:
        """Put what it makes of a model into the model."""
        self.check(graph)
        tensors = tensors_of(model)
        for name, value in self.generate(graph, tensors).items():
            tensors[name].copy_(value)


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def widths_of(form: Mapping[str, Any]) -> tuple[int, ...]:
    """The kinds of kernel that it has an encoder for: all sizes, but those below 9 with the 9 of a 3 x 3 kernel."""
    sizes = sorted({size for _, size in form["kernels"]})
    return tuple(size for size in sizes if size >= 9 or 9 not in sizes)


def _reader(width: int, hidden: int) -> nn.Module:
    if width <= WIDE:
        return nn.Linear(width, hidden)
    return nn.Sequential(nn.Linear(width, MIDDLE), nn.SiLU(), nn.Linear(MIDDLE, hidden))


def _writer(width: int, hidden: int) -> nn.Module:
    first = nn.Linear(hidden, hidden), nn.SiLU()
    if width <= WIDE:
        return nn.Sequential(*first, nn.Linear(hidden, width))
    return nn.Sequential(*first, nn.Linear(hidden, MIDDLE), nn.SiLU(), nn.Linear(MIDDLE, width))


def save_metanetwork(meta: MetaNetwork, folder: str | Path, about: Mapping[str, Any] | None = None) -> None:
    """A new folder with `metanetwork.json` and `model.safetensors`, whole or not at all. about: how it was made."""
    own = {
        "format": FORMAT,
        "form": meta.form,
        "hidden": meta.hidden,
        "layers": len(meta.rounds),
        "ratio": meta.ratio,
        "about": dict(about or {}),
    }
    with atomic_directory(folder) as partial:
        save_file(
            {name: t.contiguous() for name, t in meta.state_dict().items()}, partial / "model.safetensors"
        )
        atomic_write_json(partial / "metanetwork.json", own)


def load_metanetwork(folder: str | Path) -> MetaNetwork:
    """What `save_metanetwork` wrote.

    Raises `SecateurError` where there is none, or its files are damaged.
    """
    folder = Path(folder).expanduser()
    if not (folder / "metanetwork.json").is_file():
        raise SecateurError(
            "there is no metanetwork.json",
            where=str(folder),
            fix=check_path(folder, "make one: secateur train metanetwork TASK --out DIR"),
        )
    own = read_object(folder / "metanetwork.json", fix="make it again")
    if own.get("format") != FORMAT:
        raise SecateurError(
            f"its format is {own.get('format')!r}, not {FORMAT!r}", where=str(folder), fix="make it again"
        )
    try:
        meta = MetaNetwork(own["form"], own["hidden"], own["layers"], own["ratio"])
        meta.load_state_dict(load_file(folder / "model.safetensors"))
    except (SafetensorError, OSError, RuntimeError, KeyError, TypeError, ValueError) as error:
        raise SecateurError(
            f"its files don't fit ({error})", where=str(folder), fix="make it again"
        ) from error
    return meta.requires_grad_(False).eval()
