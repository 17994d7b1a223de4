"""The tasks that methods compete on: small real models, real text, multiple-choice questions."""

from secateur.tasks.models import load_model

__all__ = ["load_model"]
