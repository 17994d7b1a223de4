"""Training: one loop, and the losses that it is used with."""

from secateur.training.distill import distillation
from secateur.training.fit import State, fit

__all__ = ["State", "distillation", "fit"]
