"""Which parts of a model must vanish together: `trace(model, inputs) -> Graph`."""

from secateur.graph.groups import Graph, Group, Slice
from secateur.graph.trace import trace

__all__ = ["Graph", "Group", "Slice", "trace"]
