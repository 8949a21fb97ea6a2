"""Cholesky factor of the inverse Hessian, with damping that grows until it exists."""

from dataclasses import dataclass

import torch
from torch import Tensor

from vlmq_serve.format.errors import VLMQError

_ATTEMPTS = 6


@dataclass(frozen=True)
class InverseFactor:
    """`upper` [K, K] with H^-1 = upper^T upper for the columns in `order`; `damping` relative to the mean diagonal."""

    upper: Tensor
    order: Tensor
    damping: float


def factor_inverse(hessian: Tensor, percdamp: float, act_order: bool) -> InverseFactor:
    """Factor the damped Hessian, columns sorted by falling diagonal with `act_order`.

    Columns that no token ever used (zero diagonal) are decoupled: they get plain rounding. Damping is multiplied by
    ten until the factorisation succeeds. Raises `VLMQError` on a Hessian with NaN or infinity.
    """
    diagonal = hessian.diagonal()
    if not torch.isfinite(hessian).all():
        raise VLMQError(
            "Hessian: got NaN or infinity from the calibration activations; try dtype float32, or check the data"
        )
    columns = diagonal.shape[0]
    order = torch.arange(columns, device=hessian.device)
    if act_order:
        order = torch.argsort(diagonal, descending=True, stable=True)
    ordered = hessian[order][:, order]
    dead = ordered.diagonal() == 0
    ordered.diagonal()[dead] = 1.0
    mean = float(diagonal.mean()) or 1.0
    for attempt in range(_ATTEMPTS):
        damping = percdamp * 10**attempt
        upper = _try_factor(ordered, damping * mean)
        if upper is not None:
            return InverseFactor(upper, order, damping)
    raise VLMQError(
        f"Hessian: no Cholesky factor with damping up to {damping:g} of its mean diagonal; "
        "use more calibration samples, a larger percdamp or dtype float32"
    )


def _try_factor(hessian: Tensor, shift: float) -> Tensor | None:
    """H = R R^T with R upper triangular, from the Cholesky factor of the reversed matrix; the result is R^-1."""
    damped = hessian.flip(0, 1).clone()
    damped.diagonal().add_(shift)
    lower, info = torch.linalg.cholesky_ex(damped)
    if int(info) != 0:
        return None
    identity = torch.eye(hessian.shape[0], dtype=hessian.dtype, device=hessian.device)
    upper = torch.linalg.solve_triangular(lower.flip(0, 1), identity, upper=True)
    return upper if bool(torch.isfinite(upper).all()) else None
