"""Launches the kernels that `plan` chose. Imported on the Triton path only."""

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from vlmq_serve.format.errors import VLMQError
from vlmq_serve.kernels import scratch
from vlmq_serve.kernels.gpu import gpu_of
from vlmq_serve.kernels.plan import AUTO, Plan, Shape, plan, representatives
from vlmq_serve.kernels.planes import PLANES
from vlmq_serve.kernels.tables import measured_plans
from vlmq_serve.kernels.tiles import DEQUANTIZE, SUM_WARPS, Tile
from vlmq_serve.kernels.triton_dequantize import dequantize_kernel
from vlmq_serve.kernels.triton_gemm import gemm_kernel, layout_constants, tile_constants
from vlmq_serve.kernels.triton_gemv import gemv_kernel
from vlmq_serve.kernels.triton_reduce import LAST, LAUNCH, NONE, sum_kernel

ALIGNMENT = 16
"""Bytes: kernels are compiled for x at such an address, and a view that begins elsewhere is copied."""

_warm: set[tuple[object, ...]] = set()


@dataclass(frozen=True)
class Operand:
    """A weight in the plane layout, see `planes.prepare_planes`."""

    qdata: Tensor
    scales: Tensor
    bits: int
    group_size: int
    out_features: int
    in_features: int

    @property
    def constants(self) -> dict[str, Any]:
        """Compile-time arguments that follow from the layout."""
        slabs, _, _, width = self.qdata.shape
        bf16 = self.scales.dtype == torch.bfloat16
        fixed = layout_constants(self.bits, width, self.group_size, self.in_features, bf16)
        return {**fixed, "EVEN_K": self.in_features == slabs * width * PLANES[self.bits], "enable_fp_fusion": True}

    @property
    def tensors(self) -> tuple[Tensor, Tensor]:
        """What the kernels read: words, and a scale with its zero in 32 bits."""
        return self.qdata, self.scales.view(torch.int32)


def gemm(x: Tensor, weight: Operand, kind: str = AUTO) -> Tensor:
    """x [M, K] fp16 or bf16, in the dtype of the scales, to [M, N]; `kind` is one of `plan.KINDS`."""
    if x.dtype != weight.scales.dtype:
        raise VLMQError(
            f"activations: got {x.dtype}, the weight was prepared for {weight.scales.dtype}; prepare it again"
        )
    return run(x, weight, plan(x.shape[0], shape_of(weight), gpu_of(x.device), kind))


def shape_of(weight: Operand) -> Shape:
    """What `plan` is asked about, with what was measured for this layer on its GPU."""
    key = (weight.bits, weight.out_features, weight.in_features)
    measured = measured_plans(gpu_of(weight.qdata.device)).get(key, ())
    return Shape(weight.out_features, weight.in_features, weight.qdata.shape[0], weight.bits, measured)


def warm_up(weight: Operand, kind: str = AUTO) -> None:
    """Run every kernel that a product with this weight can need once: nothing is compiled in a request, or while a
    CUDA graph is captured. Layers of one kind do it once per process."""
    gpu = gpu_of(weight.qdata.device)
    shape = shape_of(weight)
    kinds = (weight.qdata.device, shape, kind, weight.group_size, weight.scales.dtype)
    if kinds in _warm:
        return
    for rows in representatives(shape, gpu, kind).values():
        x = torch.zeros(rows, weight.in_features, dtype=weight.scales.dtype, device=weight.qdata.device)
        run(x, weight, plan(rows, shape, gpu, kind))
    _warm.add(kinds)


def run(x: Tensor, weight: Operand, chosen: Plan) -> Tensor:
    """x [M, K] times the weight in the chosen way, [M, N]."""
    x = x.contiguous()
    if x.data_ptr() % ALIGNMENT:
        x = x.clone()
    with torch.cuda.device_of(x):
        if chosen.tile is None:
            return _dense(x, weight, chosen.step)
        return _fused(x, weight, chosen.tile, chosen)


def _fused(x: Tensor, weight: Operand, tile: Tile, chosen: Plan) -> Tensor:
    rows, cols = x.shape
    split = chosen.split
    y = torch.empty((rows, weight.out_features), dtype=x.dtype, device=x.device)
    grid = (triton.cdiv(weight.out_features, tile.rows_n), triton.cdiv(rows, tile.rows_m))
    reduce = NONE if split == 1 else LAST if chosen.one_launch else LAUNCH
    # Pointers that a variant does not read still have to be of their type.
    size = grid[0] * grid[1] * split * tile.rows_m * tile.rows_n if split > 1 else 4
    parts = scratch.take(x.device, (size,), torch.float32)
    even = weight.out_features % tile.rows_n == 0
    kernel = gemv_kernel if tile.gemv else gemm_kernel
    kernel[(*grid, split)](
        x, *weight.tensors, y, parts, scratch.counters(x.device), rows, weight.out_features, cols,
        weight.qdata.shape[0], split, **weight.constants, **tile_constants(tile), REDUCE=reduce, EVEN_N=even,
        num_warps=tile.warps,
    )  # fmt: skip
    if reduce == LAUNCH:
        sum_kernel[grid](
            parts, y, rows, weight.out_features, split, BM=tile.rows_m, BN=tile.rows_n, EVEN_N=even,
            num_warps=SUM_WARPS,
        )  # fmt: skip
    return y


def _dense(x: Tensor, weight: Operand, step: int) -> Tensor:
    """`step` rows of the weight at a time: dequantized into the scratch, multiplied into their columns of y."""
    rows, cols = x.shape
    y = torch.empty((rows, weight.out_features), dtype=x.dtype, device=x.device)
    dense = scratch.take(x.device, (step, cols), x.dtype)
    tile = DEQUANTIZE.rows_n
    for start in range(0, weight.out_features, step):
        stop = min(start + step, weight.out_features)
        grid = (triton.cdiv(stop - start, tile), weight.qdata.shape[0])
        dequantize_kernel[grid](
            *weight.tensors, dense, start // tile, stop, weight.out_features, cols, **weight.constants,
            BN=tile, EVEN_N=(stop - start) % tile == 0, num_warps=DEQUANTIZE.warps,
        )  # fmt: skip
        torch.mm(x, dense[: stop - start].t(), out=y[:, start:stop])
    return y
