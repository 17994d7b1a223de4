"""secateur: saliency-driven pruning. Find what is redundant in a network, cut it out, repair what is left, prove it."""

from secateur.doctor import doctor
from secateur.errors import SecateurError, SecateurWarning
from secateur.graph import Graph, Group, trace
from secateur.io.artefact import load
from secateur.io.exchange import export
from secateur.measure import measure
from secateur.method import Method, list_methods, recommend, register
from secateur.pruning.method import UnitMethod, WeightMethod
from secateur.pruning.plan import Plan
from secateur.pruning.prune import Options, Pruned, apply_plan, prune
from secateur.saliency import saliency
from secateur.taxonomy import MethodInfo
from secateur.tokens.attach import Attached, attach
from secateur.training.method import TrainMethod
from secateur.training.recover import recover
from secateur.training.train_prune import train_prune

__version__ = "0.1.0"

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
    "TrainMethod",
    "UnitMethod",
    "WeightMethod",
    "apply_plan",
    "attach",
    "doctor",
    "export",
    "list_methods",
    "load",
    "measure",
    "prune",
    "recommend",
    "recover",
    "register",
    "saliency",
    "trace",
    "train_prune",
]
