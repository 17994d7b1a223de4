"""Selective NormGrad: only what speaks for the class.

Rebuffi et al. 2020, https://arxiv.org/abs/2004.02866. Spec: normgrad.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from secateur.method import register
from secateur.methods.normgrad import CONTRIBUTIONS, REDUCTIONS, NormGrad
from secateur.taxonomy import record


@register
@dataclass
class SelectiveNormGrad(NormGrad):
    """NormGrad that counts only what speaks for the class: the norm of the positive part of x g.

    >>> secateur.saliency(model, image, method="selective-normgrad", target=281).values  # doctest: +SKIP
    """

    info = record("selective-normgrad")

    contribution: str = field(
        default="scaling", metadata={"help": ", ".join(CONTRIBUTIONS), "choices": CONTRIBUTIONS}
    )
    reduction: str = field(
        default="positive", metadata={"help": ", ".join(REDUCTIONS), "choices": REDUCTIONS}
    )
