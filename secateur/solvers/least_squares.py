"""Closed-form repair: least squares on kept inputs, and biases that make up for removed ones."""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.errors import SecateurError

# Closed forms


def least_squares(weight: Tensor, hessian: Tensor, keep: Tensor, damping: float = 0.01) -> Tensor:
    """The consumer's weight that best does without the inputs that leave; theirs are zero columns.

    >>> X = torch.tensor([[1, 0, 1, 2], [0, 1, 1, 0], [1, 1, 0, 1.0]])
    >>> least_squares(torch.tensor([[1, 2, -1.0]]), X @ X.T, torch.tensor([1, 2]), damping=0)
    tensor([[0., 2., 0.]])

    weight: [out, in]. hessian: [in, in], any multiple of X X^T over the inputs X [in, samples]. keep: sorted indices
    of the inputs that stay. damping: added to the diagonal of the hessian, as a share of its mean.

    W_k + W_p H_pk (H_kk)^-1: Optimal Brain Surgeon's update for the removed inputs p together, W H_:k (H_kk)^-1, in
    the form that gives back the same bits when nothing leaves. Spec: spa, algorithm C.

    Raises `SecateurError` where shapes don't fit or the hessian isn't finite.
    """
    keep = keep.to(weight.device)
    size = weight.shape[-1]
    if weight.ndim != 2 or hessian.shape != (size, size):
        raise SecateurError(
            f"the weight is {list(weight.shape)}, the hessian {list(hessian.shape)}",
            where="least_squares",
            fix="[out, in] and [in, in]",
        )
    if not torch.isfinite(hessian).all():
        raise SecateurError(
            "the hessian isn't finite", where="least_squares", fix="check the calibration data for NaN"
        )
    gone = torch.ones(size, dtype=torch.bool, device=weight.device)
    gone[keep] = False
    new = weight.clone()
    if not gone.any():
        return new
    new[:, gone] = 0
    if not len(keep):
        return new
    hessian = hessian.to(weight.device, torch.promote_types(hessian.dtype, torch.float32))
    inner = hessian[keep][:, keep].clone()
    inner.diagonal().add_(damping * hessian.diagonal().mean())
    cross = hessian[keep][:, gone]
    factor, failed = torch.linalg.cholesky_ex(inner)
    if failed:
        solved = torch.linalg.pinv(inner, hermitian=True) @ cross
    else:
        solved = torch.cholesky_solve(cross, factor)
    lost = weight[:, gone].to(hessian.dtype)
    new[:, keep] = (weight[:, keep].to(hessian.dtype) + lost @ solved.T).to(weight.dtype)
    return new


def bias_compensation(weight: Tensor, mean: Tensor, keep: Tensor) -> Tensor:
    """[out]: what the inputs that leave gave on average, W (mean * gone); add it to the bias.

    >>> bias_compensation(torch.tensor([[1, -2.0]]), torch.tensor([1.0, 0.25]), keep=torch.tensor([0]))
    tensor([-0.5000])

    weight: [out, in], or [out, in, height, width] of a convolution (exact where padding isn't reached). mean: [in],
    the average of each input over samples. FLAP, arXiv 2312.11983. Spec: weight-baselines, 12.
    """
    if mean.shape != (weight.shape[1],):
        raise SecateurError(
            f"the mean is {list(mean.shape)}, the weight {list(weight.shape)}",
            where="bias_compensation",
            fix="[in] and [out, in]",
        )
    gone = mean.to(weight.device, torch.promote_types(mean.dtype, torch.float32)).clone()
    gone[keep.to(weight.device)] = 0
    total = weight.flatten(2).sum(-1) if weight.ndim > 2 else weight
    return (total.to(gone.dtype) @ gone).to(weight.dtype)
