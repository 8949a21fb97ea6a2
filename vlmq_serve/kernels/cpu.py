"""CPU paths on the nibble layout: torch's int4 kernel for few rows of x, dequantized blocks for many.

Weights of 2 and 3 bits are carried as 4-bit codes re-centred around 8, because the int4 kernel keeps its additive
term in bf16: with q' = q + 8 - 2^(b-1) that term is (2^(b-1) - zero) * scale, small, and rounds harmlessly.
"""

import torch
from torch import Tensor

from vlmq_serve.format.weight import PackedWeight
from vlmq_serve.kernels.nibbles import NIBBLE_MID, ROW_PAD, pack_nibbles

INT4_GROUPS = (256, 128, 64, 32)
INT4_MAX_ROWS = 64
"""Rows of x up to which the int4 kernel beats dequantized blocks; measured with AVX2 (benchmarks/kernels)."""

BLOCK_BYTES_PER_THREAD = 2 << 20
BLOCK_BYTES_MAX = 16 << 20
"""Scratch for dequantized weights: about what stays in the cache between writing and multiplying."""


def prepare_int4(weight: PackedWeight, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """For the int4 kernel: codes [Np/B, K, B/2], bf16 [K/G, Np, 2] of (scale, additive term), nothing.

    A group of the whole row is cut into equal smaller ones, which changes no value.
    """
    cols = weight.shape[1]
    codes, scales, zeros = _recentred(weight)
    group = cols // scales.shape[0]
    if group not in INT4_GROUPS:
        scales, zeros = (t.repeat_interleave(group // _divisor(cols), dim=0) for t in (scales, zeros))
    offset = (NIBBLE_MID - zeros.to(torch.float32)) * scales.to(torch.float32)
    pair = torch.stack((scales.to(torch.float32), offset), dim=-1).to(torch.bfloat16)
    return pack_nibbles(codes, block), pair.contiguous(), torch.empty(0, dtype=torch.uint8, device=codes.device)


def prepare_dequant(weight: PackedWeight, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """For exact products: codes [Np/B, K, B/2], scales [K/G, Np] in their own dtype, zeros uint8 [K/G, Np]."""
    codes, scales, zeros = _recentred(weight)
    return pack_nibbles(codes, block), scales.contiguous(), zeros.contiguous()


def _divisor(cols: int) -> int:
    return next(g for g in INT4_GROUPS if cols % g == 0)


def _recentred(weight: PackedWeight) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [Np, K], scales and zeros [K/G, Np] with the middle code at 8; padding rows are weights of zero."""
    rows = weight.shape[0]
    shift = NIBBLE_MID - weight.scheme.mid_code
    pad = -rows % ROW_PAD
    codes = torch.nn.functional.pad(weight.codes() + shift, (0, 0, 0, pad), value=NIBBLE_MID)
    scales = torch.nn.functional.pad(weight.scales.t(), (0, pad))
    if weight.zeros is None:
        zeros = torch.full(scales.shape, NIBBLE_MID, dtype=torch.uint8, device=scales.device)
    else:
        zeros = torch.nn.functional.pad(weight.zeros.t() + shift, (0, pad), value=NIBBLE_MID)
    return codes, scales, zeros


def gemm_int4(x: Tensor, qdata: Tensor, scales: Tensor, zeros: Tensor, out_features: int) -> Tensor:
    """bf16 x [M, K] to [M, N]; few rows by torch's int4 kernel, many by dequantized blocks."""
    if x.shape[0] > INT4_MAX_ROWS or x.dtype != torch.bfloat16:
        return gemm_dequant(x, qdata, scales, zeros, out_features)
    blocks, cols, half = qdata.shape
    group = cols // scales.shape[0]
    packed = qdata.view(blocks * half * 2, cols // 2)
    y = torch.ops.aten._weight_int4pack_mm_for_cpu(x.contiguous(), packed, group, scales.contiguous())
    return y if y.shape[1] == out_features else y[:, :out_features].contiguous()


def gemm_dequant(x: Tensor, qdata: Tensor, scales: Tensor, zeros: Tensor, out_features: int) -> Tensor:
    """x [M, K] of any float type to [M, N] in the same type, through exact weights in bounded blocks of rows.

    The product runs in fp32, or in bf16 where x is bf16 and the CPU has bf16 arithmetic.
    """
    blocks, cols, half = qdata.shape
    compute = torch.bfloat16 if x.dtype == torch.bfloat16 and cpu_has_bf16() else torch.float32
    wide = x.to(compute)
    scratch_bytes = min(BLOCK_BYTES_MAX, BLOCK_BYTES_PER_THREAD * torch.get_num_threads())
    step = max(1, scratch_bytes // (cols * half * 8))
    scratch = torch.empty((min(step, blocks), cols, 2 * half), dtype=torch.float32, device=x.device)
    out = torch.empty((x.shape[0], blocks * half * 2), dtype=x.dtype, device=x.device)
    for start in range(0, blocks, step):
        stop = min(start + step, blocks)
        tile = scratch[: stop - start]
        dequantize_blocks(qdata, scales, zeros, start, stop, tile)
        y = torch.matmul(wide, tile.to(compute))
        out[:, start * half * 2 : stop * half * 2].view(-1, stop - start, 2 * half).copy_(y.transpose(0, 1))
    return out if out.shape[1] == out_features else out[:, :out_features].contiguous()


def dequantize_blocks(qdata: Tensor, scales: Tensor, zeros: Tensor, start: int, stop: int, out: Tensor) -> None:
    """Write the exact fp32 weights of the row blocks [start, stop) into out [stop-start, K, B], transposed."""
    count, cols, block = out.shape
    codes = qdata[start:stop]
    out[:, :, : block // 2].copy_(codes & 15)
    out[:, :, block // 2 :].copy_(codes >> 4)
    rows = slice(start * block, stop * block)
    if zeros.numel():
        scale = scales[:, rows].to(torch.float32)
        zero = zeros[:, rows].to(torch.float32)
    else:
        scale, offset = scales[:, rows].to(torch.float32).unbind(-1)
        # The int4 kernel's additive term is a rounded multiple of the scale by an integer: take the integer back.
        multiple = torch.where(scale == 0, torch.zeros_like(scale), torch.round(offset / scale))
        zero = NIBBLE_MID - multiple
    groups = scale.shape[0]
    grouped = out.view(count, groups, cols // groups, block)
    scale, offset = (t.view(groups, count, 1, block).transpose(0, 1) for t in (scale, -zero * scale))
    # code * scale and zero * scale are exact in fp32 for 16-bit scales, hence so is their difference.
    torch.addcmul(offset, grouped, scale, out=grouped)


def cpu_has_bf16() -> bool:
    """Whether bf16 products run on hardware instructions here."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
