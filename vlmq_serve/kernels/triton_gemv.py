"""A product of one or two rows of x without matrix instructions: codes meet x in fp32 on the ordinary units.

A code is OR-ed into the mantissa of a float: at bit e of 2^(23 - e) it makes the number 2^(23 - e) + q, in one
instruction and exactly. The sum over a group is then taken apart again,

    sum (q - zero) x = sum (2^(23-e) + q) x - sum 2^(23-e) x - zero sum x,

where the last two sums know no row of the weight. What cancels grows with 2^(23 - e), so e is at least 10 for bf16 and
14 for fp16, which keeps the error below the rounding of y. The scale multiplies once per group.

Compared with `gemm_kernel`, whose matrix units multiply padded rows for nothing, it spends more instructions on a
weight, and waits for no matrix instruction and no shared memory. Which is faster only a GPU can say: no rule chooses
it, a measured table may (`tables`).
"""

import triton
import triton.language as tl

from vlmq_serve.kernels.triton_reduce import _finish
from vlmq_serve.kernels.triton_unpack import _group, _words


@triton.constexpr_function
def _bit(plane, bits):
    """Bit of its 16-bit word at which a code begins; for the code of 3 bits that lies in two words, its lowest bit."""
    if bits != 3:
        return plane * bits
    half, index = plane // 8, plane % 8
    return 15 if index == 7 else 3 * index if index < 5 else 8 * half + 3 * (index - 5)


@triton.constexpr_function
def _place(plane, bits, bf16, high):
    """(shift to the left, bit e) of the code of a plane in the lower or higher half of a register."""
    if bits == 3 and plane % 8 == 7:
        return (-16 if high else 0), 15
    lowest = 10 if bf16 else 14
    bit = _bit(plane, bits) + (16 if high else 0)
    if lowest <= bit <= 23 - bits:
        return 0, bit
    window = 24 - bits - lowest
    shift = lowest - bit // window * window
    return shift, bit + shift


@triton.constexpr_function
def _base(plane, bits, bf16, high):
    """2^(23 - e) of `_place`."""
    return 2.0 ** (23 - _place(plane, bits, bf16, high)[1])


@triton.constexpr_function
def _shifted(source, shift):
    """PTX that leaves `source`, shifted to the left, in a; nothing to do for a shift of 0."""
    return "" if shift == 0 else f"{'shl.b32' if shift > 0 else 'shr.u32'} a, {source}, {abs(shift)}; "


@triton.constexpr_function
def _float_ptx(plane, bits, bf16):
    """PTX that makes two floats, $0 and $1, of the codes in the halves of $2, and for a split code also of $3."""
    code = "{ .reg .b32 a; "
    for high in (0, 1):
        shift, e = _place(plane, bits, bf16, high)
        magic = f"0x{(127 + 23 - e) << 23:08x}"
        split = bits == 3 and plane % 8 == 7
        mask = 1 if split else 2**bits - 1
        code += _shifted("$2", shift)
        code += f"lop3.b32 ${high}, {'a' if shift else '$2'}, 0x{mask << e:08x}, {magic}, 0xEA; "
        if split:
            # Bits 1 and 2 of the code belong at e + 1.
            code += _shifted("$3", e + 1 - (6 + 8 * (plane // 8) + 16 * high))
            code += f"lop3.b32 ${high}, a, 0x{6 << e:08x}, ${high}, 0xEA; "
    return code + "}"


@triton.jit
def _floats(u, v, t, P: tl.constexpr, BITS: tl.constexpr, BF16: tl.constexpr):
    """2^(23-e) + q for plane P, fp32 [BN, KW]."""
    ptx: tl.constexpr = _float_ptx(P, BITS, BF16)
    word = v if BITS == 3 and P >= 8 else u
    if BITS == 3 and P % 8 == 7:
        return tl.inline_asm_elementwise(ptx, "=&r,=&r,r,r", [word, t], tl.float32, True, 2)
    if BITS == 3 and P % 8 >= 5:
        word = t
    return tl.inline_asm_elementwise(ptx, "=&r,=&r,r", [word], tl.float32, True, 2)


@triton.jit
def _eight(values, BN: tl.constexpr, KW: tl.constexpr):
    """The columns 8i, 8i+1, … 8i+7 of [BN, KW] as eight tensors [BN, KW / 8]. One thread holds all eight: no moves."""
    even, odd = tl.split(tl.reshape(values, (BN, KW // 8, 4, 2)))
    c04, c26 = tl.split(tl.reshape(even, (BN, KW // 8, 2, 2)))
    c15, c37 = tl.split(tl.reshape(odd, (BN, KW // 8, 2, 2)))
    c0, c4 = tl.split(c04)
    c2, c6 = tl.split(c26)
    c1, c5 = tl.split(c15)
    c3, c7 = tl.split(c37)
    return c0, c1, c2, c3, c4, c5, c6, c7


@triton.jit
def _multiply(
    part, bases, sums, w, xp, mask, P: tl.constexpr, BITS: tl.constexpr, BF16: tl.constexpr, BN: tl.constexpr,
    KW: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Adds plane P to the three sums of a group, for 8 neighbours along K at a time: [BN, KW / 8] and [1, KW / 8]."""
    x = tl.load(xp) if EVEN else tl.load(xp, mask=mask, other=0.0)
    x0, x1, x2, x3, x4, x5, x6, x7 = _eight(x.to(tl.float32), 1, KW)
    w0, w1, w2, w3, w4, w5, w6, w7 = _eight(w, BN, KW)
    part += w0 * x0
    part += w1 * x1
    part += w2 * x2
    part += w3 * x3
    part += w4 * x4
    part += w5 * x5
    part += w6 * x6
    part += w7 * x7
    even = x0 + x2 + x4 + x6
    odd = x1 + x3 + x5 + x7
    bases += _base(P, BITS, BF16, False) * even + _base(P, BITS, BF16, True) * odd
    return part, bases, sums + even + odd


@triton.jit(do_not_specialize=["M", "slabs", "splits"])
def gemv_kernel(
    x_ptr, w_ptr, g_ptr, y_ptr, parts_ptr, count_ptr, M, N, K, slabs, splits,
    BITS: tl.constexpr, PLANES_: tl.constexpr, KW: tl.constexpr, G: tl.constexpr,
    BF16: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr, PARTS: tl.constexpr,
    REDUCE: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """Arguments as in `gemm_kernel`; BM is 1 or 2, PARTS 1."""
    WORDS: tl.constexpr = 3 if BITS == 3 else 1
    IN_GROUP: tl.constexpr = G // KW if G > 0 and G < PLANES_ * KW else PLANES_
    start = tl.program_id(1) * BM
    rn = tl.program_id(0) * BN + tl.arange(0, BN)
    rj = tl.arange(0, KW)
    n_mask = rn < N
    x_ptr += start.to(tl.int64) * K
    acc = tl.zeros((BN, KW // 8), tl.float32)
    acc1 = tl.zeros((BN, KW // 8), tl.float32)
    first = tl.program_id(2)
    second = tl.where(start + 1 < M, K, 0)  # no second row, no load
    tl.assume(first < slabs)
    for b in tl.range(first, slabs, splits, num_stages=STAGES):
        wp = w_ptr + b * (WORDS * N * KW) + rn[:, None] * KW + rj[None, :]
        u, v, t = _words(wp, 0, N, n_mask, BITS, KW, PARTS, EVEN_N)
        for p in tl.static_range(PLANES_):
            if p % IN_GROUP == 0:
                row = 0 if G == 0 else (b * PLANES_ + p) * KW // G
                scale, zero = _group(g_ptr, row, rn, n_mask, N, BF16, EVEN_N)
                scale = scale.to(tl.float32)
                part = tl.zeros((BN, KW // 8), tl.float32)
                bases = tl.zeros((1, KW // 8), tl.float32)
                sums = tl.zeros((1, KW // 8), tl.float32)
                part1 = part
                bases1 = bases
                sums1 = sums
            w = _floats(u, v, t, p, BITS, BF16)
            k = ((b * PLANES_ + p) * KW + rj)[None, :]
            part, bases, sums = _multiply(part, bases, sums, w, x_ptr + k, k < K, p, BITS, BF16, BN, KW, EVEN_K)
            if BM == 2:
                part1, bases1, sums1 = _multiply(
                    part1, bases1, sums1, w, x_ptr + K + k, k < second, p, BITS, BF16, BN, KW, False
                )
            if p % IN_GROUP == IN_GROUP - 1:
                acc += scale[:, None] * (part - bases - zero[:, None] * sums)
                if BM == 2:
                    acc1 += scale[:, None] * (part1 - bases1 - zero[:, None] * sums1)
    one = tl.sum(acc, 1)
    y = tl.join(one, tl.sum(acc1, 1)) if BM == 2 else one[:, None]
    _finish(y, y_ptr, parts_ptr, count_ptr, M, N, splits, BM, BN, REDUCE, EVEN_N)
