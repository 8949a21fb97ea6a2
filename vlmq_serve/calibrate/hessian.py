"""Input statistics of a linear: the (weighted) Hessian and the (weighted) residual correlation.

With f the input of the full-precision path, u that of the quantized path and a weight l per token (VLMQ,
arXiv 2508.03351, enhanced Hessian; l = 1 gives GPTQ and GPTAQ):

    H = mean_t l_t u_t u_t^T        D = mean_t l_t (f_t - u_t) u_t^T
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Statistics:
    """hessian [K, K]; residual [K, K] with residual[a, b] = mean l (f - u)_a u_b, None for symmetric solvers."""

    hessian: Tensor
    residual: Tensor | None
    tokens: int


class StatisticsAccumulator:
    """Running sums over batches of tokens; `dtype` is that of the sums."""

    def __init__(
        self, features: int, with_residual: bool, device: torch.device, dtype: torch.dtype = torch.float32
    ) -> None:
        self._hessian = torch.zeros(features, features, dtype=dtype, device=device)
        self._residual = torch.zeros_like(self._hessian) if with_residual else None
        self._tokens = 0

    def add(self, quantized: Tensor, full: Tensor | None = None, weights: Tensor | None = None) -> None:
        """Add tokens: inputs [..., K] of the quantized and, for the residual, the full path; weights [...]."""
        u = quantized.reshape(-1, quantized.shape[-1]).to(self._hessian.dtype)
        weighted = u if weights is None else u * weights.reshape(-1, 1).to(u)
        self._hessian.addmm_(u.T, weighted)
        if self._residual is not None:
            if full is None:
                raise RuntimeError("residual statistics need the full-precision inputs")
            self._residual.addmm_((full.reshape(u.shape).to(u) - u).T, weighted)
        self._tokens += u.shape[0]

    def finish(self) -> Statistics:
        """Means over all tokens added."""
        count = max(self._tokens, 1)
        residual = None if self._residual is None else self._residual / count
        return Statistics(self._hessian / count, residual, self._tokens)
