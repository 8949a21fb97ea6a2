"""Random weights for the kernels' tests, and what they stand for in float64."""

import torch

from vlmq_serve.format.scheme import Scheme
from vlmq_serve.format.weight import PackedWeight


def random_weight(
    rows: int, cols: int, bits: int, group: int, symmetric: bool, dtype: torch.dtype = torch.bfloat16
) -> PackedWeight:
    scheme = Scheme(bits, group, symmetric)
    generator = torch.Generator().manual_seed(rows * cols + bits)
    shape = (rows, scheme.num_groups(cols))
    codes = torch.randint(0, 2**bits, (rows, cols), generator=generator)
    scales = (torch.rand(shape, generator=generator) * 0.02 + 0.01).to(dtype)
    zeros = None if symmetric else torch.randint(0, 2**bits, shape, generator=generator)
    return PackedWeight.from_codes(codes, scales, zeros, scheme)


def exact_weight(weight: PackedWeight) -> torch.Tensor:
    """float64 [N, K], independent of the code under test."""
    rows, cols = weight.shape
    codes = weight.codes().double().reshape(rows, weight.scales.shape[1], -1)
    zeros = weight.scheme.mid_code if weight.zeros is None else weight.zeros.double()[:, :, None]
    return ((codes - zeros) * weight.scales.double()[:, :, None]).reshape(rows, cols)


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.double() - expected).norm() / expected.norm())
