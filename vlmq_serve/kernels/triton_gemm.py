"""One Triton GEMM for 2, 3 and 4-bit weights: y[M, N] = x[M, K] @ ((q - zero) * scale)[N, K].T

Layout of the weight: `planes`. The formulation:

* The dequantized weight is the LEFT operand of the product (acc is [BN, BM]): on Hopper it stays in registers.
* A code becomes a float without conversion. OR-ed into the mantissa of 2^7 (bf16) or 2^10 (fp16) at bit e, a
  code q is the number base + q * 2^e; times 2^-e, plus -(base * 2^-e + zero), it is q - zero, exactly, in one
  packed FMA for two codes. Codes that do not fit the mantissa are shifted first, several by one shift.
* The zero is subtracted before the scale multiplies: folding both into one FMA would round a term of the size
  of base * scale to 16 bits.
* Sums are fp32. With SPLIT > 1 every K range writes fp32 partial sums of its own, which a second kernel adds in
  a fixed order: the same input gives the same bits every time.
"""

import triton
import triton.language as tl

from vlmq_serve.kernels.planes import PLANES
from vlmq_serve.kernels.tiles import Tile


@triton.constexpr_function
def _mantissa(bf16):
    """Mantissa bits that can hold codes."""
    return 7 if bf16 else 10


@triton.constexpr_function
def _position(plane, bits, bf16):
    """(shift of the word, bit e of the code in the mantissa after it) of a plane."""
    if bits == 3 and plane == 15:
        return 0, 0
    index = plane % 5 if bits == 3 else plane
    together = _mantissa(bf16) // bits
    return index // together * together * bits, index % together * bits


@triton.constexpr_function
def _exponent(plane, bits, bf16):
    """2^e of `_position`."""
    return 2.0 ** _position(plane, bits, bf16)[1]


@triton.constexpr_function
def _pair(value):
    """The 32-bit literal of one 16-bit pattern twice."""
    return f"0x{value:04x}{value:04x}"


@triton.constexpr_function
def _scaling(e, bf16):
    """16-bit pattern of 2^-e."""
    return (127 - e) << 7 if bf16 else (15 - e) << 10


@triton.constexpr_function
def _ptx(plane, bits, bf16):
    """PTX for one plane, two codes at a time: the last two operands are -(base * 2^-e + zero) and the scale."""
    kind = "bf16x2" if bf16 else "f16x2"
    magic = _pair(0x4300 if bf16 else 0x6400)
    shift, e = _position(plane, bits, bf16)
    if bits == 3 and plane == 15:
        zero, scale = "$4", "$5"
        code = (
            f"shr.u32 a, $1, 15; lop3.b32 a, a, {_pair(1)}, {magic}, 0xEA;"
            f" shr.u32 b, $2, 14; lop3.b32 a, b, {_pair(2)}, a, 0xEA;"
            f" shr.u32 b, $3, 13; lop3.b32 a, b, {_pair(4)}, a, 0xEA;"
        )
    else:
        zero, scale = "$2", "$3"
        mask = _pair((2**bits - 1) << e)
        word = "a" if shift else "$1"
        code = f"shr.u32 a, $1, {shift}; " if shift else ""
        code += f"lop3.b32 a, {word}, {mask}, {magic}, 0xEA;"
    # bf16x2 has no plain multiplication before sm_90: it is an FMA with -0.
    return (
        "{ .reg .b32 a, b, c; " + code + f" mov.b32 c, {_pair(_scaling(e, bf16))}; fma.rn.{kind} a, a, c, {zero};"
        f" mov.b32 c, {_pair(0x8000)}; fma.rn.{kind} $0, a, {scale}, c; }}"
    )


@triton.jit
def _plane(u, v, t, zero, scale, P: tl.constexpr, BITS: tl.constexpr, BF16: tl.constexpr):
    """Weights [BN, KW] of plane P from its words; zero (see `_ptx`) and scale are [BN, 1] 16-bit floats."""
    ptx: tl.constexpr = _ptx(P, BITS, BF16)
    if BITS == 3 and P == 15:
        if BF16:
            w = tl.inline_asm_elementwise(ptx, "=r,r,r,r,r,r", [u, v, t, zero, scale], tl.bfloat16, True, 2)
        else:
            w = tl.inline_asm_elementwise(ptx, "=r,r,r,r,r,r", [u, v, t, zero, scale], tl.float16, True, 2)
    else:
        if BITS != 3 or P < 5:
            word = u
        elif P < 10:
            word = v
        else:
            word = t
        if BF16:
            w = tl.inline_asm_elementwise(ptx, "=r,r,r,r", [word, zero, scale], tl.bfloat16, True, 2)
        else:
            w = tl.inline_asm_elementwise(ptx, "=r,r,r,r", [word, zero, scale], tl.float16, True, 2)
    return w


@triton.jit
def _row(row_ptr, rn, mask, EVEN_N: tl.constexpr):
    """One group's scales or zeros, [BN]."""
    return tl.load(row_ptr + rn) if EVEN_N else tl.load(row_ptr + rn, mask=mask, other=0.0)


@triton.jit
def gemm_kernel(
    x_ptr, w_ptr, s_ptr, z_ptr, y_ptr, M, N, K, slabs,
    BITS: tl.constexpr, PLANES_: tl.constexpr, KW: tl.constexpr, G: tl.constexpr, ZEROS: tl.constexpr,
    BF16: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, SPLIT: tl.constexpr, STAGES: tl.constexpr,
    EVEN_N: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """G is the group size, 0 for the whole row. y is [M, N], or fp32 [SPLIT, M, N] partial sums."""
    KB: tl.constexpr = PLANES_ * KW
    GROUPS: tl.constexpr = KB // G if G > 0 and G < KB else 1  # groups per slab
    PER_GROUP: tl.constexpr = PLANES_ // GROUPS
    BASE: tl.constexpr = 128.0 if BF16 else 1024.0
    DTYPE: tl.constexpr = tl.bfloat16 if BF16 else tl.float16
    pid_n = tl.program_id(0)
    pid_m = tl.program_id(1)
    pid_k = tl.program_id(2)
    rn = pid_n * BN + tl.arange(0, BN)
    lm = tl.arange(0, BM)
    rj = tl.arange(0, KW)
    m_mask = (pid_m * BM + lm < M)[None, :]
    n_mask = rn < N
    # The row offset in 64 bits, everything inside a tile in 32.
    x_ptr += (pid_m * BM).to(tl.int64) * K
    acc = tl.zeros((BN, BM), tl.float32)
    for b in tl.range(pid_k, slabs, SPLIT, num_stages=STAGES):
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
            xp = x_ptr + lm[None, :] * K + k[:, None]
            x = tl.load(xp, mask=m_mask if EVEN_K else m_mask & (k < K)[:, None], other=0.0)
            acc = tl.dot(w, x, acc)
    y_ptr += ((pid_k.to(tl.int64) * M if SPLIT > 1 else 0) + (pid_m * BM).to(tl.int64)) * N
    out = acc.to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + lm[None, :] * N + rn[:, None], out, mask=m_mask if EVEN_N else m_mask & n_mask[:, None])


@triton.jit
def sum_kernel(parts_ptr, y_ptr, size, SPLIT: tl.constexpr, BLOCK: tl.constexpr):
    """y[i] = sum of parts[s, i] over s in order, for i below size."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < size
    total = tl.zeros((BLOCK,), tl.float32)
    for s in tl.static_range(SPLIT):
        total += tl.load(parts_ptr + s * size + i, mask=mask, other=0.0)
    tl.store(y_ptr + i, total.to(y_ptr.dtype.element_ty), mask=mask)


def constants(bits: int, width: int, group_size: int, in_features: int, zeros: bool, bf16: bool, tile: Tile) -> dict:
    """Compile-time arguments of `gemm_kernel` that do not depend on M and N."""
    return {
        "BITS": bits,
        "PLANES_": PLANES[bits],
        "KW": width,
        "G": 0 if group_size >= in_features else group_size,
        "ZEROS": zeros,
        "BF16": bf16,
        "BM": tile.rows_m,
        "BN": tile.rows_n,
        "STAGES": tile.stages,
    }
