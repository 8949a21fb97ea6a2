"""The plain torch product: what every other path is measured against."""

import torch
from torch import Tensor
from torch.nn import functional

from vlmq_serve.format.scheme import Scheme
from vlmq_serve.format.weight import PackedWeight


def dequantize(qdata: Tensor, scales: Tensor, zeros: Tensor, bits: int, group_size: int, dtype: torch.dtype) -> Tensor:
    """Weight [N, K] in `dtype` from checkpoint layout; empty `zeros` mean symmetric codes."""
    symmetric = zeros.numel() == 0
    rows = qdata.shape[0]
    # Any allowed size names the groups here: the real one is in the shape of the scales.
    scheme = Scheme(bits, group_size if scales.shape[1] > 1 else -1, symmetric)
    return PackedWeight(qdata, scales.reshape(rows, -1), None if symmetric else zeros, scheme).dequantize(dtype)


def gemm(x: Tensor, qdata: Tensor, scales: Tensor, zeros: Tensor, bits: int, group_size: int) -> Tensor:
    """x [M, K] times the transposed dequantized weight, accumulated in fp32 whatever the type of x: [M, N]."""
    weight = dequantize(qdata, scales, zeros, bits, group_size, torch.float32)
    return functional.linear(x.to(torch.float32), weight).to(x.dtype)
