"""Launches the kernels that `plan` chose. Imported on the Triton path only."""

from typing import Any

import torch
import triton
from torch import Tensor

from vlmq_serve.format.errors import VLMQError
from vlmq_serve.kernels import scratch
from vlmq_serve.kernels.gpu import gpu_of
from vlmq_serve.kernels.plan import AUTO, Plan, plan
from vlmq_serve.kernels.planes import PLANES
from vlmq_serve.kernels.tiles import DEQUANTIZE, Tile
from vlmq_serve.kernels.triton_dequantize import dequantize_kernel
from vlmq_serve.kernels.triton_gemm import constants, gemm_kernel, sum_kernel

SUM_BLOCK = 1024


def gemm(
    x: Tensor, qdata: Tensor, scales: Tensor, zeros: Tensor, bits: int, group_size: int, out_features: int,
    kind: str = AUTO,
) -> Tensor:  # fmt: skip
    """x [M, K] fp16 or bf16, in the dtype of the scales, to [M, N]; `kind` forces one half of the family."""
    if x.dtype != scales.dtype:
        raise VLMQError(f"activations: got {x.dtype}, the weight was prepared for {scales.dtype}; prepare it again")
    x = x.contiguous()
    chosen = plan(x.shape[0], out_features, x.shape[1], qdata.shape[0], bits, gpu_of(x.device), kind)
    with torch.cuda.device_of(x):
        if chosen.tile is None:
            return _dense(x, qdata, scales, zeros, bits, group_size, out_features, chosen.step)
        return _fused(x, qdata, scales, zeros, bits, group_size, out_features, chosen.tile, chosen)


def _fused(
    x: Tensor, qdata: Tensor, scales: Tensor, zeros: Tensor, bits: int, group_size: int, out_features: int,
    tile: Tile, chosen: Plan,
) -> Tensor:  # fmt: skip
    rows, cols = x.shape
    slabs, split = qdata.shape[0], chosen.split
    y = torch.empty((rows, out_features), dtype=x.dtype, device=x.device)
    target = y if split == 1 else scratch.take(x.device, (split, rows, out_features), torch.float32)
    grid = (triton.cdiv(out_features, tile.rows_n), triton.cdiv(rows, tile.rows_m), split)
    gemm_kernel[grid](
        x, qdata, scales, zeros if zeros.numel() else scales, target, rows, out_features, cols, slabs,
        **_constants(qdata, scales, zeros, bits, group_size, cols, tile), SPLIT=split,
        EVEN_N=out_features % tile.rows_n == 0, num_warps=tile.warps, enable_fp_fusion=True,
    )  # fmt: skip
    if split > 1:
        sum_kernel[(triton.cdiv(y.numel(), SUM_BLOCK),)](target, y, y.numel(), SPLIT=split, BLOCK=SUM_BLOCK)
    return y


def _dense(
    x: Tensor, qdata: Tensor, scales: Tensor, zeros: Tensor, bits: int, group_size: int, out_features: int, step: int
) -> Tensor:
    """`step` rows of the weight at a time: dequantized into the scratch, multiplied into their columns of y."""
    rows, cols = x.shape
    y = torch.empty((rows, out_features), dtype=x.dtype, device=x.device)
    weight = scratch.take(x.device, (step, cols), x.dtype)
    fixed = _constants(qdata, scales, zeros, bits, group_size, cols, DEQUANTIZE)
    for absent in ("BM", "STAGES"):
        del fixed[absent]
    for start in range(0, out_features, step):
        stop = min(start + step, out_features)
        grid = (triton.cdiv(stop - start, DEQUANTIZE.rows_n), qdata.shape[0])
        dequantize_kernel[grid](
            qdata, scales, zeros if zeros.numel() else scales, weight, start, stop, out_features, cols, **fixed,
            EVEN_N=(stop - start) % DEQUANTIZE.rows_n == 0, num_warps=DEQUANTIZE.warps, enable_fp_fusion=True,
        )  # fmt: skip
        torch.mm(x, weight[: stop - start].t(), out=y[:, start:stop])
    return y


def _constants(
    qdata: Tensor, scales: Tensor, zeros: Tensor, bits: int, group_size: int, cols: int, tile: Tile
) -> dict[str, Any]:
    slabs, _, _, width = qdata.shape
    fixed = constants(bits, width, group_size, cols, zeros.numel() > 0, scales.dtype == torch.bfloat16, tile)
    return {**fixed, "EVEN_K": cols == slabs * width * PLANES[bits]}
