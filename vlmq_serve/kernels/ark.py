"""CPU path through AutoRound Kernel (package `auto-round-lib`, optional): exact products at 2, 3 and 4 bits in memory.

Weights are multiplied in fp32, and scales and zeros kept as they are, so the result is that of the exact weights.
Its int8 and bf16 modes, which round activations or weights further, are not used.
"""

from functools import lru_cache
from types import ModuleType

import torch
from torch import Tensor

from vlmq_serve.format.weight import PackedWeight

COMPUTE, SCALES = "fp32", "fp32"
"""bf16 scales give wrong products in release 0.16.0 on an AVX2 CPU."""


@lru_cache(maxsize=1)
def library() -> ModuleType | None:
    """The package, where it is installed with a CPU library that loads here.

    Its first product sets the number of OpenMP threads of the process, which torch shares, to all cores; later ones
    keep what is set. So the first is made here, and the number put back.
    """
    try:
        import auto_round_kernel
    except (ImportError, OSError):
        return None
    if auto_round_kernel.cpu_lib is None:
        return None
    threads = torch.get_num_threads()
    ones = torch.ones(1, 32, dtype=torch.float32, device="cpu")
    codes = torch.zeros(32, 32, dtype=torch.int8, device="cpu")
    kind = (32, COMPUTE, "int4", SCALES, True)
    blob = auto_round_kernel.repack_quantized_weight(codes, ones, codes[:1], *kind)
    auto_round_kernel.woqgemm(ones, blob, ones[:0], 32, 32, *kind)
    torch.set_num_threads(threads)
    found: ModuleType = auto_round_kernel
    return found


def _loaded() -> ModuleType:
    found = library()
    if found is None:
        raise RuntimeError("cpu_ark: auto-round-lib is not installed; it was when the weight was prepared")
    return found


def prepare_ark(weight: PackedWeight) -> tuple[Tensor, Tensor, Tensor]:
    """One int8 blob in the layout of the package, with scales and zeros inside; nothing beside it."""
    scheme, cols = weight.scheme, weight.shape[1]
    codes = (weight.codes().to(torch.int8) - scheme.mid_code).t().contiguous()
    scales = weight.scales.to(torch.float32).t().contiguous()
    zeros = torch.zeros(scales.shape, dtype=torch.int8, device=scales.device)
    if weight.zeros is not None:
        zeros = (weight.zeros.to(torch.int8) - scheme.mid_code).t().contiguous()
    group = scheme.group_length(cols)
    blob = _loaded().repack_quantized_weight(codes, scales, zeros, group, COMPUTE, f"int{scheme.bits}", SCALES, True)
    empty = torch.empty(0, dtype=torch.uint8, device=blob.device)
    return blob, empty, empty


def gemm_ark(x: Tensor, qdata: Tensor, bits: int, group_size: int, out_features: int) -> Tensor:
    """x [M, K] of any float type to [M, N] in the same type, computed in fp32."""
    given = x.to(torch.float32).contiguous()
    nothing = given.new_empty(0)
    y: Tensor = _loaded().woqgemm(
        given, qdata, nothing, out_features, x.shape[1], group_size, COMPUTE, f"int{bits}", SCALES, True
    )
    return y.to(x.dtype)
