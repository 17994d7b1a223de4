"""Training: one loop, the losses it is used with, and what methods that prune while they train are made of."""

from secateur.training.distill import distillation
from secateur.training.fit import fit
from secateur.training.recipe import Recipe
from secateur.training.state import State
from secateur.training.task import Task

__all__ = ["Recipe", "State", "Task", "distillation", "fit"]
