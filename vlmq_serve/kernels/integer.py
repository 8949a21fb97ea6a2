"""CPU paths with integer products, in C++ (`cpp/integer.cpp`): 2, 3, 4 and 8-bit codes at their own width in memory.

x is rounded to int16 or int8 per row and group, with an error of 2^-16 or 2^-8 of the group's largest value; codes are
integers already, and their products are summed exactly. 16 bits are far more exact than bf16; 8 are half the work.
"""

from functools import lru_cache

import torch
from torch import Tensor

from vlmq_serve.format.scheme import ALLOWED_BITS
from vlmq_serve.format.weight import PackedWeight
from vlmq_serve.kernels import native

BLOCK_ROWS = 32
DENSE_ROWS = 64
"""Rows of bf16 x from which dequantized weights and torch's product serve, on CPUs with AMX only: its peak is several
times that of our kernels. By arithmetic, not measured."""
DENSE_BYTES = 8 << 20
_NAME = "vlmq::gemm_integer"
_OTHER_LAYOUT = f"{_NAME}: got a weight of another layout"
_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def _loaded(isa: str | None) -> "native.ctypes.CDLL":
    found = native.library(isa)
    if found is None:
        raise RuntimeError(f"CPU kernels: none for {isa or 'this CPU'}; there were when the weight was prepared")
    return found


@lru_cache(maxsize=256)
def _pass_rows(rows: int, cols: int, isa: str | None) -> tuple[int, int]:
    """Rows of x in one call, and the bytes of scratch that it needs."""
    library = _loaded(isa)
    step = min(rows, library.vlmq_max_rows())
    return step, library.vlmq_scratch(step, cols)


def prepare_integer(weight: PackedWeight) -> tuple[Tensor, Tensor, Tensor]:
    """Words int32 [Np/32, K*bits/32, 32] (`cpp/codes.h`), scales [Np/32, K/G, 32] as they are, zeros uint8 likewise
    or empty when symmetric; Np is N padded to whole blocks with weights of zero."""
    rows, cols = weight.shape
    bits, pad = weight.scheme.bits, -rows % BLOCK_ROWS
    blocks = (rows + pad) // BLOCK_ROWS
    given = weight.qweight.cpu().contiguous()
    words = torch.empty(blocks, cols * bits // 32, BLOCK_ROWS, dtype=torch.int32, device="cpu")
    threads = torch.get_num_threads()
    _loaded(None).vlmq_pack(given.data_ptr(), rows, cols, bits, rows + pad, words.data_ptr(), threads)
    zeros = torch.empty(0, dtype=torch.uint8, device="cpu")
    if weight.zeros is not None:
        zeros = _in_blocks(weight.zeros, pad)
    return words, _in_blocks(weight.scales, pad), zeros


def _in_blocks(values: Tensor, pad: int) -> Tensor:
    """[N, groups] to [Np/32, groups, 32]."""
    padded = torch.nn.functional.pad(values.cpu(), (0, 0, 0, pad))
    return padded.reshape(-1, BLOCK_ROWS, values.shape[1]).transpose(1, 2).contiguous()


def dense_rows() -> int | None:
    """Rows of bf16 x from which `gemm_dense` serves here, if it does."""
    return DENSE_ROWS if "amx_bf16" in native.cpu_flags() else None


def gemm_integer(
    x: Tensor, qdata: Tensor, scales: Tensor, zeros: Tensor, bits: int, out_features: int, x_bits: int = 16,
    isa: str | None = None,
) -> Tensor:  # fmt: skip
    """x [M, K] of any float type to [M, N] in the same type, by way of integers of `x_bits` bits, 16 or 8.

    Many rows of bf16 on a CPU with AMX are multiplied without rounding x. `isa` forces one of `native.supported_isas`.
    """
    if x.shape[0] == 0:
        return x.new_empty((0, out_features))
    least = dense_rows()
    if x.dtype == torch.bfloat16 and least is not None and x.shape[0] >= least:
        return gemm_dense(x, qdata, scales, zeros, bits, out_features, isa)
    library = _loaded(isa)
    if x.stride(1) != 1:
        x = x.contiguous()
    rows, cols = x.shape
    step, scratch_bytes = _pass_rows(rows, cols, isa)
    y = torch.empty((rows, out_features), dtype=x.dtype, device=x.device)
    scratch = torch.empty(scratch_bytes, dtype=torch.uint8, device=x.device)
    weight = _arguments(cols, qdata, scales, zeros, bits)
    threads, size = torch.get_num_threads(), x.element_size()
    for start in range(0, rows, step):
        # Addresses and not slices, each of which would take longer than a small product.
        x_at, y_at = x.data_ptr() + start * x.stride(0) * size, y.data_ptr() + start * out_features * size
        count = min(step, rows - start)
        library.vlmq_gemm(
            x_at, x.stride(0), _TYPES[x.dtype], count, *weight, out_features, y_at, scratch.data_ptr(), x_bits, threads
        )
    return y


def check(x: Tensor, qdata: Tensor, scales: Tensor, zeros: Tensor, bits: int, out_features: int, x_bits: int) -> None:
    """What `check` of `cpp/operator.cpp` asks, in its words: the kernels trust the addresses that they are given."""
    torch._check(
        x.dtype in _TYPES and scales.dtype in _TYPES, lambda: f"{_NAME}: float32, bfloat16 and float16 are supported"
    )
    torch._check(bits in ALLOWED_BITS, lambda: f"{_NAME}: got {bits} bits")
    torch._check(x_bits in (16, 8), lambda: f"{_NAME}: got {x_bits} bits of x")
    torch._check(x.dim() > 0 and qdata.dim() == 3 and scales.dim() == 3, lambda: _OTHER_LAYOUT)
    cols, (blocks, words, _), groups = x.shape[-1], qdata.shape, scales.shape[1]
    torch._check(
        cols > 0 and words * 32 == cols * bits,
        lambda: f"{_NAME}: got x with K={cols} for a weight with K={words * 32 // bits}",
    )
    torch._check(
        qdata.shape[2] == BLOCK_ROWS and scales.shape == (blocks, groups, BLOCK_ROWS) and groups > 0
        and cols % groups == 0 and cols // groups % 32 == 0 and out_features <= blocks * BLOCK_ROWS
        and qdata.dtype == torch.int32
        and (zeros.numel() == 0 or (zeros.numel() == scales.numel() and zeros.dtype == torch.uint8)),
        lambda: _OTHER_LAYOUT,
    )  # fmt: skip
    torch._check(
        qdata.is_contiguous() and scales.is_contiguous() and zeros.is_contiguous(),
        lambda: f"{_NAME}: got a weight that is not contiguous; pass its tensors as prepare() made them",
    )


def gemm_dense(
    x: Tensor, qdata: Tensor, scales: Tensor, zeros: Tensor, bits: int, out_features: int, isa: str | None = None
) -> Tensor:
    """bf16 x [M, K] to [M, N] through bf16 weights in bounded parts and torch's product, which AMX makes fast."""
    library, cols, total = _loaded(isa), x.shape[1], qdata.shape[0]
    weight = _arguments(cols, qdata, scales, zeros, bits)
    step = min(total, max(1, DENSE_BYTES // (2 * cols * BLOCK_ROWS)))
    y = torch.empty((x.shape[0], total * BLOCK_ROWS), dtype=x.dtype, device=x.device)
    scratch = torch.empty(cols * step * BLOCK_ROWS, dtype=torch.bfloat16, device=x.device)
    for start in range(0, total, step):
        count = min(step, total - start)
        part = scratch[: cols * count * BLOCK_ROWS].view(cols, count * BLOCK_ROWS)
        library.vlmq_dequantize(*weight, start, count, part.data_ptr(), torch.get_num_threads())
        y[:, start * BLOCK_ROWS : (start + count) * BLOCK_ROWS] = torch.mm(x, part)
    return y if y.shape[1] == out_features else y[:, :out_features].contiguous()


def _arguments(cols: int, qdata: Tensor, scales: Tensor, zeros: Tensor, bits: int) -> tuple[int | None, ...]:
    """A prepared weight as the C functions take it."""
    zeros_at = zeros.data_ptr() if zeros.numel() else None
    return (qdata.data_ptr(), scales.data_ptr(), _TYPES[scales.dtype], zeros_at, bits, cols, scales.shape[1])
