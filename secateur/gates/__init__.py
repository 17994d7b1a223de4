"""Gates: units that are open by a number, which is learned. `place` puts them where the traced graph says."""

from secateur.gates.choice import Choice, choice_of, counts_of, depth_choices, width_choices
from secateur.gates.controllers import Lagrangian, log_cost, penalty
from secateur.gates.cost import ExpectedCost
from secateur.gates.gated import Gated, place
from secateur.gates.laws import Gate, Gaussian, HardConcrete, Law, StraightThrough
from secateur.gates.points import Points, points_of
from secateur.gates.reading import Reading, answers_over

__all__ = [
    "Choice",
    "ExpectedCost",
    "Gate",
    "Gated",
    "Gaussian",
    "HardConcrete",
    "Lagrangian",
    "Law",
    "Points",
    "Reading",
    "StraightThrough",
    "answers_over",
    "choice_of",
    "counts_of",
    "depth_choices",
    "log_cost",
    "penalty",
    "place",
    "points_of",
    "width_choices",
]
