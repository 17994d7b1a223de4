"""The tasks that methods compete on: small real models with real data."""

from secateur.tasks.models import load_model

__all__ = ["load_model"]
