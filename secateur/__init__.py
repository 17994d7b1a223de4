"""secateur: saliency-driven pruning."""

from secateur.errors import SecateurError

__version__ = "0.1.0"
__all__ = ["SecateurError"]
