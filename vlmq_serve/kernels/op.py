"""The custom operator `vlmq::gemm`: one entry for every path, opaque to torch.compile."""

import torch
from torch import Tensor

from vlmq_serve.kernels import choice, cpu, integer, reference

NAME = "gemm"
SCHEMA = (
    "gemm(Tensor x, Tensor qdata, Tensor scales, Tensor zeros, int bits, int group_size, int out_features, str path)"
    " -> Tensor"
)
_library: torch.library.Library | None = None


def ensure_registered() -> None:
    """Register the operator; safe to call any number of times."""
    global _library
    if _library is not None:
        return
    library = torch.library.Library("vlmq", "FRAGMENT")
    library.define(SCHEMA)
    for key in ("CPU", "CUDA"):
        library.impl(NAME, _gemm, key)
    torch.library.register_fake("vlmq::gemm", _gemm_fake, lib=library)
    # The registration lives as long as this object.
    _library = library


def gemm(
    x: Tensor, qdata: Tensor, scales: Tensor, zeros: Tensor, bits: int, group_size: int, out_features: int, path: str
) -> Tensor:
    """x [..., K] times a prepared weight (the fields of `PreparedWeight`), [..., N] in the dtype of x."""
    ensure_registered()
    y: Tensor = torch.ops.vlmq.gemm(x, qdata, scales, zeros, bits, group_size, out_features, path)
    return y


def _gemm(
    x: Tensor, qdata: Tensor, scales: Tensor, zeros: Tensor, bits: int, group_size: int, out_features: int, path: str
) -> Tensor:
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    if rows.shape[0] == 0:
        return x.new_empty((*x.shape[:-1], out_features))
    if path in choice.TRITON_KINDS:
        from vlmq_serve.kernels import triton_path

        weight = triton_path.Operand(qdata, scales, bits, group_size, out_features, rows.shape[1])
        y = triton_path.gemm(rows, weight, choice.TRITON_KINDS[path])
    elif path in choice.ACTIVATION_BITS:
        y = integer.gemm_integer(rows, qdata, scales, zeros, bits, out_features, choice.ACTIVATION_BITS[path])
    elif path == choice.CPU_INT4:
        y = cpu.gemm_int4(rows, qdata, scales, zeros, out_features)
    elif path == choice.CPU_DEQUANT:
        y = cpu.gemm_dequant(rows, qdata, scales, zeros, out_features)
    else:
        y = reference.gemm(rows, qdata, scales, zeros, bits, group_size)
    return y if x.dim() == 2 else y.reshape(*x.shape[:-1], out_features)


def _gemm_fake(
    x: Tensor, qdata: Tensor, scales: Tensor, zeros: Tensor, bits: int, group_size: int, out_features: int, path: str
) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features))
