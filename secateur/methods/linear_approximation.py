"""The linear approximation: activation times gradient.

Rebuffi et al. 2020, https://arxiv.org/abs/2004.02866, the cell "scaling, sum" of their grid. Spec: normgrad.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from secateur.method import register
from secateur.methods.normgrad import CONTRIBUTIONS, REDUCTIONS, NormGrad
from secateur.taxonomy import record


@register
@dataclass
class LinearApproximation(NormGrad):
    """The sum over channels of activation times gradient; signed.

    >>> secateur.saliency(model, image, method="linear-approximation", target=281).values  # doctest: +SKIP
    """

    info = record("linear-approximation")

    contribution: str = field(
        default="scaling", metadata={"help": ", ".join(CONTRIBUTIONS), "choices": CONTRIBUTIONS}
    )
    reduction: str = field(default="sum", metadata={"help": ", ".join(REDUCTIONS), "choices": REDUCTIONS})
