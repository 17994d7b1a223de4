"""A model that loses units again and again along one trace."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from secateur.errors import SecateurError
from secateur.graph import Graph
from secateur.graph.smaller import left, smaller
from secateur.surgery.changes import Changes, Keep, _put, _refresh, _tensor
from secateur.surgery.config import fit_config
from secateur.surgery.cut import cut_modules
from secateur.utils.screen import Screen


def within(now: Tensor, kept: Tensor) -> Tensor:
    """Where `kept` units stand among those that are there now; both are numbers of the dense model, sorted.

    >>> within(torch.tensor([0, 2, 5, 7]), torch.tensor([2, 7]))
    tensor([1, 3])

    Raises `SecateurError` where one has left already.
    """
    at = torch.searchsorted(now, kept)
    if not torch.equal(now[at.clamp_max(len(now) - 1)], kept):
        gone = kept[~torch.isin(kept, now)].tolist()
        raise SecateurError(f"units {gone[:8]} have left already", where="keep", fix="keep what is there")
    return at


class Shrinking(Screen):
    """Cuts a model, in place, as often as asked. `keep` holds what is left, in the numbers of the dense graph; `graph` is
    that of the model as it is now.

    >>> shrinking = Shrinking(model, graph)  # doctest: +SKIP
    >>> shrinking.to({"fc1:neurons": torch.arange(12)})  # doctest: +SKIP
    >>> shrinking.to({"fc1:neurons": torch.arange(11)})  # doctest: +SKIP
    >>> shrinking.settle()  # doctest: +SKIP

    Parameters and buffers stay the same objects, with fewer entries, so optimisers go on with them. All cuts end where one
    cut to the last `keep` would. Raises `SecateurError` as `cut_units` does, and for units that have left already.
    """

    def __init__(self, model: nn.Module, graph: Graph):
        self.model, self.dense, self.graph = model, graph, graph
        self.keep: dict[str, Tensor] = {}
        self._changes = Changes()

    def to(self, keep: Keep) -> dict[str, dict[int, Tensor]]:
        """Cut to these kept units; gives what stayed of each tensor: name -> axis -> places it had before.

        Groups that `keep` doesn't name stay as they are.
        """
        own = self.relative(keep)
        after, stays = smaller(self.graph, own), left(self.graph, own)
        before = {name: _tensor(self.model, name) for name in self.graph.shapes}
        made = cut_modules(self.model, self.graph, own)
        for name in made.shapes:
            old, new = before[name], _tensor(self.model, name)
            if new is not old:
                old.grad = None
                # a graph of the last step may still hold where gradients of the old shape go; another dtype lets go of it
                old.data = torch.empty(
                    0, dtype=torch.float64 if old.dtype != torch.float64 else torch.float32, device=old.device
                )
                old.data = new.detach()
                _put(self.model, name, old)
        for path in {name.rpartition(".")[0] for name in made.shapes}:
            _refresh(self.model.get_submodule(path))
        self.graph = after
        self.keep |= {name: units.cpu().long().sort().values for name, units in keep.items() if name in own}
        self._changes.shapes |= made.shapes
        self._changes.config |= made.config
        for path, values in made.attributes.items():
            self._changes.attributes.setdefault(path, {}).update(values)
        places: dict[str, dict[int, Tensor]] = {}
        for (name, dim), stay in stays.items():
            places.setdefault(name, {})[dim] = stay.nonzero().squeeze(1)
        return places

    def relative(self, keep: Keep) -> dict[str, Tensor]:
        """The units to keep in the numbers of the model as it is now, without the groups that lose none."""
        found = {}
        for name, units in keep.items():
            now = self.keep.get(name, torch.arange(self.dense[name].size))
            own = within(now, units.cpu().long().sort().values)
            if len(own) < len(now):
                found[name] = own
        return found

    def settle(self) -> Changes:
        """Put the config of a transformers model right, once all has left; gives what all cuts changed."""
        fit_config(self.model, self.dense, self.dense._kept(self.keep), self._changes)
        return self._changes
