"""The tasks that methods compete on: small real models with real data."""

from secateur.tasks.models import load_model
from secateur.tasks.registry import TASKS, load_task

__all__ = ["TASKS", "load_model", "load_task"]
