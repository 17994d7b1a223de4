"""Remove units from a model: as zeros (`mask_units`) or for real (`cut_units`), and prove that both agree."""

from secateur.surgery.changes import Changes
from secateur.surgery.cut import cut_units
from secateur.surgery.mask import mask_units, unit_masks, unmask_units
from secateur.surgery.prove import prove
from secateur.surgery.shrink import Shrinking
from secateur.surgery.trial import trial

__all__ = ["Changes", "Shrinking", "cut_units", "mask_units", "prove", "trial", "unit_masks", "unmask_units"]
