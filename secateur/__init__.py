"""secateur: saliency-driven pruning. Find what is redundant in a network, cut it out, repair what is left, prove it.

The public names are loaded when they are first used, so that what needs no torch doesn't wait for it.
"""

from __future__ import annotations

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

from secateur.utils.about import __version__ as __version__

if TYPE_CHECKING:
    from secateur.comparison.run import compare
    from secateur.doctor import doctor
    from secateur.errors import SecateurError, SecateurWarning
    from secateur.graph import Graph, Group, trace
    from secateur.io.artefact import load
    from secateur.io.exchange import export
    from secateur.io.folder import prune_folder
    from secateur.measure import measure
    from secateur.method import Method, list_methods, recommend, register
    from secateur.pruning.auto import prune
    from secateur.pruning.method import UnitMethod, WeightMethod
    from secateur.pruning.options import Options
    from secateur.pruning.plan import Plan
    from secateur.pruning.prune import Pruned, apply_plan
    from secateur.pruning.threshold import Threshold, threshold
    from secateur.saliency import saliency
    from secateur.taxonomy import MethodInfo
    from secateur.tokens.attach import Attached, attach
    from secateur.tokens.train import train_tokens
    from secateur.training.method import TrainMethod
    from secateur.training.recover import recover
    from secateur.training.train_prune import train_prune


__all__ = [
    "Attached",
    "Graph",
    "Group",
    "Method",
    "MethodInfo",
    "Options",
    "Plan",
    "Pruned",
    "SecateurError",
    "SecateurWarning",
    "Threshold",
    "TrainMethod",
    "UnitMethod",
    "WeightMethod",
    "apply_plan",
    "attach",
    "compare",
    "doctor",
    "export",
    "list_methods",
    "load",
    "measure",
    "prune",
    "prune_folder",
    "recommend",
    "recover",
    "register",
    "saliency",
    "threshold",
    "trace",
    "train_prune",
    "train_tokens",
]

_HOME = {
    "comparison.run": "compare",
    "doctor": "doctor",
    "errors": "SecateurError SecateurWarning",
    "graph": "Graph Group trace",
    "io.artefact": "load",
    "io.exchange": "export",
    "io.folder": "prune_folder",
    "measure": "measure",
    "method": "Method list_methods recommend register",
    "pruning.method": "UnitMethod WeightMethod",
    "pruning.plan": "Plan",
    "pruning.options": "Options",
    "pruning.auto": "prune",
    "pruning.prune": "Pruned apply_plan",
    "pruning.threshold": "Threshold threshold",
    "saliency": "saliency",
    "taxonomy": "MethodInfo",
    "tokens.attach": "Attached attach",
    "tokens.train": "train_tokens",
    "training.method": "TrainMethod",
    "training.recover": "recover",
    "training.train_prune": "train_prune",
}
_WHERE = {name: f"{__name__}.{module}" for module, names in _HOME.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_WHERE[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(types.ModuleType):
    """Keeps `secateur.measure` the function, although importing a file of the room of that name binds the room to it."""

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, types.ModuleType) and _WHERE.get(name) == value.__name__:
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
