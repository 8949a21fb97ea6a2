"""The Triton kernel that only writes weights: rows of a plane layout as a dense 16-bit matrix."""

import triton
import triton.language as tl

from vlmq_serve.kernels.triton_unpack import _factor, _group, _offset, _plane, _words


@triton.jit(do_not_specialize=["first", "stop"])
def dequantize_kernel(
    w_ptr, g_ptr, y_ptr, first, stop, N, K,
    BITS: tl.constexpr, PLANES_: tl.constexpr, KW: tl.constexpr, G: tl.constexpr,
    BF16: tl.constexpr, BN: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """Rows [first * BN, stop) of the [N, K] weight to y [stop - first * BN, K], a slab per program; G as in `gemm`."""
    WORDS: tl.constexpr = 3 if BITS == 3 else 1
    IN_GROUP: tl.constexpr = G // KW if G > 0 and G < PLANES_ * KW else PLANES_
    ln = tl.program_id(0) * BN + tl.arange(0, BN)
    b = tl.program_id(1)
    rn = (first + tl.program_id(0)) * BN + tl.arange(0, BN)
    rj = tl.arange(0, KW)
    n_mask = rn < stop
    wp = w_ptr + b * (WORDS * N * KW) + rn[:, None] * KW + rj[None, :]
    u, v, t = _words(wp, 0, N, n_mask, BITS, KW, 1, EVEN_N)
    for p in tl.static_range(PLANES_):
        if p % IN_GROUP == 0:
            row = 0 if G == 0 else (b * PLANES_ + p) * KW // G
            scale, zero = _group(g_ptr, row, rn, n_mask, N, BF16, EVEN_N)
        offset = _offset(zero, p, BITS, BF16)[:, None]
        w = _plane(u, v, t, offset, _factor(scale, BITS, BF16)[:, None], p, BITS, BF16)
        k = (b * PLANES_ + p) * KW + rj
        yp = y_ptr + ln[:, None] * K + k[None, :]
        if EVEN_N and EVEN_K:
            tl.store(yp, w)
        else:
            tl.store(yp, w, mask=n_mask[:, None] & (k < K)[None, :])
