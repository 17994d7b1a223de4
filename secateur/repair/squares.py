"""Masked least squares: every output row of a matrix solved for on the inputs that its own mask leaves it."""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.errors import SecateurError

CLOSE = 1e-4
"""Steps end where every row's gradient, in the norm they go by, has fallen to this share of the largest."""


def masked_least_squares(
    weight: Tensor,
    mask: Tensor,
    hessian: Tensor,
    cross: Tensor | None = None,
    *,
    damping: float = 0.01,
    steps: int = 40,
    start: Tensor | None = None,
) -> Tensor:
    """The weight with zeros outside `mask` whose outputs are nearest to the targets: min ||W X - T||² + λ ||W - weight||².

    >>> X = torch.tensor([[1.0, 0, 1, 2], [0, 1, 1, 0], [1, 1, 0, 1]])
    >>> W, kept = torch.tensor([[1.0, 2, -1]]), torch.tensor([[False, True, True]])
    >>> masked_least_squares(W, kept, X @ X.T, damping=0)
    tensor([[0., 2., 0.]])

    weight: the dense [out, in]; mask: bool [out, in]. hessian: [in, in], X Xᵀ over the inputs X [in, tokens]. cross: [out, in],
    T Xᵀ of targets T [out, tokens], of the same scale as `hessian`; None: T = weight X. damping: λ as a share of the mean of
    the hessian's diagonal. start: where the steps begin, such as what another repair gave; None: the masked weight.

    Where all rows keep the same inputs (units) they are solved for by one Cholesky factor, else by conjugate gradients, scaled
    by the diagonal, all rows at once: a step is one product with the hessian, and each row has its own step length. Exact after
    as many steps as a row keeps inputs; a few dozen come as near as the damping.

    Raises `SecateurError` where shapes don't fit or the hessian isn't finite.
    """
    out, size = weight.shape
    if hessian.shape != (size, size) or mask.shape != (out, size):
        raise SecateurError(
            f"weight {list(weight.shape)}, mask {list(mask.shape)}, hessian {list(hessian.shape)}",
            where="masked_least_squares",
            fix="[out, in], [out, in] and [in, in]",
        )
    if not torch.isfinite(hessian).all():
        raise SecateurError(
            "the hessian isn't finite", where="masked_least_squares", fix="check the calibration data for NaN"
        )
    kind = torch.promote_types(weight.dtype, torch.float32)
    dense, inner = weight.to(kind), hessian.to(kind).clone()
    pull = damping * inner.diagonal().mean()
    target = (dense @ inner if cross is None else cross.to(kind)) + pull * dense
    inner.diagonal().add_(pull)
    alike = bool((mask == mask[0]).all())
    if alike:
        return _shared(target, mask[0], inner).to(weight.dtype)
    begin = torch.where(mask, dense if start is None else start.to(kind), 0)
    return _steps(begin, target, mask, inner, steps).to(weight.dtype)


def _shared(target: Tensor, kept: Tensor, inner: Tensor) -> Tensor:
    """All rows on the same inputs: target_k (inner_kk)⁻¹."""
    found = torch.zeros_like(target)
    own = inner[kept][:, kept]
    if not len(own):
        return found
    factor, failed = torch.linalg.cholesky_ex(own)
    if failed:
        found[:, kept] = target[:, kept] @ torch.linalg.pinv(own, hermitian=True)
    else:
        found[:, kept] = torch.cholesky_solve(target[:, kept].T, factor).T
    return found


def _steps(weight: Tensor, target: Tensor, mask: Tensor, inner: Tensor, steps: int) -> Tensor:
    """Conjugate gradients in every row, kept to its mask."""
    tiny = torch.finfo(weight.dtype).tiny
    scale = torch.where(inner.diagonal() > 0, inner.diagonal(), 1)
    rest = (target - weight @ inner) * mask
    way = rest / scale
    size = first = (rest * way).sum(1, keepdim=True)  # [out, 1]
    for _ in range(steps):
        along = (way @ inner) * mask
        length = size / (way * along).sum(1, keepdim=True).clamp_min(tiny)
        weight = weight + length * way
        rest = rest - length * along
        scaled = rest / scale
        size, before = (rest * scaled).sum(1, keepdim=True), size
        if size.max() <= CLOSE**2 * first.max():
            break
        way = scaled + size / before.clamp_min(tiny) * way
    return weight
