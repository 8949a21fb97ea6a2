"""The Triton kernel that only writes weights: rows of a plane layout as a dense 16-bit matrix."""

import triton
import triton.language as tl

from vlmq_serve.kernels.triton_gemm import _exponent, _plane, _row


@triton.jit
def dequantize_kernel(
    w_ptr, s_ptr, z_ptr, y_ptr, start, stop, N, K,
    BITS: tl.constexpr, PLANES_: tl.constexpr, KW: tl.constexpr, G: tl.constexpr, ZEROS: tl.constexpr,
    BF16: tl.constexpr, BN: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """Rows [start, stop) of the [N, K] weight to y [stop - start, K], one slab per program. G as in `gemm_kernel`."""
    KB: tl.constexpr = PLANES_ * KW
    GROUPS: tl.constexpr = KB // G if G > 0 and G < KB else 1  # groups per slab
    PER_GROUP: tl.constexpr = PLANES_ // GROUPS
    BASE: tl.constexpr = 128.0 if BF16 else 1024.0
    DTYPE: tl.constexpr = tl.bfloat16 if BF16 else tl.float16
    ln = tl.program_id(0) * BN + tl.arange(0, BN)
    b = tl.program_id(1)
    rn = start + ln
    rj = tl.arange(0, KW)
    n_mask = rn < stop
    wp = w_ptr + b * (N * KW if BITS != 3 else 3 * N * KW) + rn[:, None] * KW + rj[None, :]
    if EVEN_N:
        u = tl.load(wp)
        v = tl.load(wp + N * KW) if BITS == 3 else u
        t = tl.load(wp + 2 * N * KW) if BITS == 3 else u
    else:
        u = tl.load(wp, mask=n_mask[:, None], other=0)
        v = tl.load(wp + N * KW, mask=n_mask[:, None], other=0) if BITS == 3 else u
        t = tl.load(wp + 2 * N * KW, mask=n_mask[:, None], other=0) if BITS == 3 else u
    for p in tl.static_range(PLANES_):
        if p % PER_GROUP == 0:
            if G == 0:
                row = 0
            elif G < KB:
                row = b * GROUPS + p // PER_GROUP
            else:
                row = b * KB // G
            scale = _row(s_ptr + row * N, rn, n_mask, EVEN_N)
            if ZEROS:
                zero = _row(z_ptr + row * N, rn, n_mask, EVEN_N).to(tl.float32)
            else:
                zero = tl.full((BN,), 2 ** (BITS - 1), tl.float32)
        offset = (-(BASE / _exponent(p, BITS, BF16)) - zero).to(DTYPE)
        w = _plane(u, v, t, offset[:, None], scale[:, None], p, BITS, BF16)
        k = b * KB + p * KW + rj
        yp = y_ptr + ln[:, None] * K + k[None, :]
        if EVEN_N and EVEN_K:
            tl.store(yp, w)
        else:
            tl.store(yp, w, mask=n_mask[:, None] & (k < K)[None, :])
