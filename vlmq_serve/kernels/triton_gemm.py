"""One Triton GEMM for 2, 3, 4 and 8-bit weights: y[M, N] = x[M, K] @ ((q - zero) * scale)[N, K].T

The dequantized weight (`triton_unpack`) is the LEFT operand of the product (acc is [BN, BM]): on Hopper it stays in
registers. Sums are fp32; K may be split over programs (`triton_reduce`).
"""

from typing import Any

import triton
import triton.language as tl

from vlmq_serve.kernels.planes import PLANES
from vlmq_serve.kernels.tiles import Tile
from vlmq_serve.kernels.triton_reduce import _finish
from vlmq_serve.kernels.triton_unpack import _factor, _group, _offset, _plane, _words


@triton.jit(do_not_specialize=["M", "slabs", "splits"])
def gemm_kernel(
    x_ptr, w_ptr, g_ptr, y_ptr, parts_ptr, count_ptr, M, N, K, slabs, splits,
    BITS: tl.constexpr, PLANES_: tl.constexpr, KW: tl.constexpr, G: tl.constexpr,
    BF16: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr, PARTS: tl.constexpr,
    REDUCE: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """G is the group size, 0 for the whole row.

    A step of the loop, and of its pipeline, is one slab of K, or with PARTS = 2 half of one: x for a slab of 512 and
    128 rows would fill the shared memory with a single stage.
    """
    WORDS: tl.constexpr = 3 if BITS == 3 else 1
    STEP: tl.constexpr = PLANES_ // PARTS  # planes per step
    IN_GROUP: tl.constexpr = G // KW if G > 0 and G < STEP * KW else STEP  # planes of a step with one scale
    pid_n = tl.program_id(0)
    pid_m = tl.program_id(1)
    rn = pid_n * BN + tl.arange(0, BN)
    lm = tl.arange(0, BM)
    rj = tl.arange(0, KW)
    m_mask = (pid_m * BM + lm < M)[None, :]
    n_mask = rn < N
    # The row offset in 64 bits, everything inside a tile in 32.
    x_ptr += (pid_m * BM).to(tl.int64) * K
    acc = tl.zeros((BN, BM), tl.float32)
    first = tl.program_id(2)
    # Every program has work. Without this, the way round an empty loop makes ptxas run matrix instructions one by one.
    tl.assume(first < slabs * PARTS)
    for i in tl.range(first, slabs * PARTS, splits, num_stages=STAGES):
        b = i // PARTS
        part = i % PARTS
        wp = w_ptr + b * (WORDS * N * KW) + rn[:, None] * KW + rj[None, :]
        u, v, t = _words(wp, part, N, n_mask, BITS, KW, PARTS, EVEN_N)
        for p in tl.static_range(STEP):
            if p % IN_GROUP == 0:
                row = 0 if G == 0 else (i * STEP + p) * KW // G
                scale, zero = _group(g_ptr, row, rn, n_mask, N, BF16, EVEN_N)
            offset = _offset(zero, p, BITS, BF16)[:, None]
            w = _plane(u, v, t, offset, _factor(scale, BITS, BF16)[:, None], p, BITS, BF16)
            k = (i * STEP + p) * KW + rj
            xp = x_ptr + lm[None, :] * K + k[:, None]
            x = tl.load(xp, mask=m_mask if EVEN_K else m_mask & (k < K)[:, None], other=0.0)
            acc = tl.dot(w, x, acc)
    _finish(acc, y_ptr, parts_ptr, count_ptr, M, N, splits, BM, BN, REDUCE, EVEN_N)


def layout_constants(bits: int, width: int, group_size: int, in_features: int, bf16: bool) -> dict[str, Any]:
    """Compile-time arguments that every kernel takes: layout of the weight and types."""
    return {
        "BITS": bits,
        "PLANES_": PLANES[bits],
        "KW": width,
        "G": 0 if group_size >= in_features else group_size,
        "BF16": bf16,
    }


def tile_constants(tile: Tile) -> dict[str, Any]:
    """Compile-time arguments of `gemm_kernel` and `gemv_kernel` that the tile decides."""
    return {"BM": tile.rows_m, "BN": tile.rows_n, "STAGES": tile.stages, "PARTS": tile.parts}
