"""How each ATen operation moves labels: `RULES` by the operation's name, one file a kind of operation."""

from secateur.graph.rules import contract, norm, pick, pointwise, shape  # noqa: F401  (they register their rules)
from secateur.graph.rules.moves import RULES, Call

__all__ = ["RULES", "Call"]
