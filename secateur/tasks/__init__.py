"""The tasks that methods compete on: small real models, real text, multiple-choice questions."""

from secateur.tasks.choices import load_items
from secateur.tasks.models import load_model
from secateur.tasks.text import calibration, load_calibration, load_text, sample_from

__all__ = ["calibration", "load_calibration", "load_items", "load_model", "load_text", "sample_from"]
