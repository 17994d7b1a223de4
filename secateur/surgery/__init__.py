"""Remove units from a model: as zeros (`mask_units`) or for real (`cut_units`), and prove that both agree."""

from secateur.surgery.changes import Changes
from secateur.surgery.cut import cut_units
from secateur.surgery.mask import mask_units, unmask_units
from secateur.surgery.prove import prove

__all__ = ["Changes", "cut_units", "mask_units", "prove", "unmask_units"]
