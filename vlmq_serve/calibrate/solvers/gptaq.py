"""The asymmetric residual term of GPTAQ (Li et al., ICML 2025), also the residual of VLMQ when weighted."""

from torch import Tensor


def residual_correction(residual: Tensor, upper: Tensor, alpha: float) -> Tensor:
    """P = alpha * triu(D U^T, 1) U, [K, K]; U is the upper factor of H^-1, D = mean l (f - u) u^T.

    Row q holds `alpha * D[q, q+1:] inv(H[q+1:, q+1:])`: how the columns not yet quantized make up for what the
    quantized path changed in the input that column q reads. Rows and columns in the order of the factor.
    """
    return alpha * ((residual @ upper.T).triu_(diagonal=1) @ upper)
