"""From packed words to weights, inside a Triton kernel: the device functions that all kernels of the family share.

Layout of the words: `planes`. A code becomes a float without conversion. OR-ed into the mantissa of 2^7 (bf16) or
2^10 (fp16) at bit e, a code q is the number base + q * 2^e; times 2^-e, plus -(base * 2^-e + zero), it is q - zero,
exactly, in one packed FMA for two codes. Codes that do not fit the mantissa are shifted first, several by one shift.
The zero is subtracted before the scale multiplies: folding both into one FMA would round a term of the size of
base * scale to 16 bits.

Codes of 8 bits are bytes, moved to where they belong by one `prmt` for two codes: into the mantissa of 2^10 (fp16), as
above; bf16 has 7 bits of mantissa, but its subnormal numbers and the first binade above them lie one step of 2^-133
apart, so a byte alone, in bits 0 to 7 of a bf16 number, is q * 2^-133, exactly. The FMA multiplies it by 2^127, the
largest power of two there is, and subtracts zero * 2^-6; the scale times 2^6 brings q - zero back (`_factor`).
"""

import triton
import triton.language as tl


@triton.constexpr_function
def _mantissa(bf16):
    """Mantissa bits that can hold codes."""
    return 7 if bf16 else 10


@triton.constexpr_function
def _position(plane, bits, bf16):
    """(shift of the word, bit e of the code in the mantissa after it) of a plane that lies in one word."""
    if bits == 8:
        return 0, 0  # `prmt` moves it
    if bits == 3:
        half, index = plane // 8, plane % 8
        if index == 7:
            return 0, 0
        base, index = (0, index) if index < 5 else (8 * half, index - 5)
    else:
        base, index = 0, plane
    together = _mantissa(bf16) // bits
    return base + index // together * together * bits, index % together * bits


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
    """PTX for one plane, two codes at a time: the last two operands are those of `_offset` and `_factor`."""
    kind = "bf16x2" if bf16 else "f16x2"
    magic = _pair(0x4300 if bf16 else 0x6400)
    shift, e = _position(plane, bits, bf16)
    zero, scale = "$2", "$3"
    if bits == 8:
        # The magic bytes come first: there ptxas keeps them in a register, in the second place it moves them each time.
        above = "0" if bf16 else _pair(0x6464)
        code = f"mov.b32 b, {above}; prmt.b32 a, b, $1, {0x0705 if plane else 0x0604};"
    elif bits == 3 and plane % 8 == 7:
        zero, scale = "$3", "$4"
        code = (
            f"shr.u32 a, $1, 15; lop3.b32 a, a, {_pair(1)}, {magic}, 0xEA;"
            f" shr.u32 b, $2, {5 + 8 * (plane // 8)}; lop3.b32 a, b, {_pair(6)}, a, 0xEA;"
        )
    else:
        mask = _pair((2**bits - 1) << e)
        word = "a" if shift else "$1"
        code = f"shr.u32 a, $1, {shift}; " if shift else ""
        code += f"lop3.b32 a, {word}, {mask}, {magic}, 0xEA;"
    factor = _pair(0x7F00 if bits == 8 and bf16 else _scaling(e, bf16))
    # bf16x2 has no plain multiplication before sm_90: it is an FMA with -0.
    return (
        "{ .reg .b32 a, b, c; " + code + f" mov.b32 c, {factor}; fma.rn.{kind} a, a, c, {zero};"
        f" mov.b32 c, {_pair(0x8000)}; fma.rn.{kind} $0, a, {scale}, c; }}"
    )


@triton.jit
def _plane(u, v, t, zero, scale, P: tl.constexpr, BITS: tl.constexpr, BF16: tl.constexpr):
    """Weights [BN, KW] of plane P from its words; `_offset` and `_factor` are [BN, 1] 16-bit floats."""
    ptx: tl.constexpr = _ptx(P, BITS, BF16)
    word = v if BITS == 3 and P >= 8 else u
    if BITS == 3 and P % 8 == 7:
        if BF16:
            w = tl.inline_asm_elementwise(ptx, "=r,r,r,r,r", [word, t, zero, scale], tl.bfloat16, True, 2)
        else:
            w = tl.inline_asm_elementwise(ptx, "=r,r,r,r,r", [word, t, zero, scale], tl.float16, True, 2)
    else:
        if BITS == 3 and P % 8 >= 5:
            word = t
        if BF16:
            w = tl.inline_asm_elementwise(ptx, "=r,r,r,r", [word, zero, scale], tl.bfloat16, True, 2)
        else:
            w = tl.inline_asm_elementwise(ptx, "=r,r,r,r", [word, zero, scale], tl.float16, True, 2)
    return w


@triton.jit
def _lower(word, part):
    """The byte `part` of each word in its lower byte; the upper one holds bits of the neighbour, which masks remove."""
    shift = (8 * part).to(tl.int16)
    return tl.inline_asm_elementwise(
        "{ .reg .b32 s; and.b32 s, $2, 0x1f; shr.u32 $0, $1, s; }", "=r,r,r", [word, shift], tl.int16, True, 2
    )


@triton.jit
def _words(wp, part, N, mask, BITS: tl.constexpr, KW: tl.constexpr, PARTS: tl.constexpr, EVEN_N: tl.constexpr):
    """(u, v, t) of `_plane` for a slab at wp [BN, KW], or for its part `part`: half of its planes, as planes 0, 1, …"""
    if BITS == 3:
        if PARTS == 1:
            u = _word(wp, mask, EVEN_N)
            v = _word(wp + N * KW, mask, EVEN_N)
            t = _word(wp + 2 * N * KW, mask, EVEN_N)
        else:
            u = _word(wp + part * (N * KW), mask, EVEN_N)
            v = u
            t = _lower(_word(wp + 2 * N * KW, mask, EVEN_N), part)
    else:
        u = _word(wp, mask, EVEN_N)
        if PARTS > 1:
            u = _lower(u, part)
        v = u
        t = u
    return u, v, t


@triton.jit
def _word(wp, mask, EVEN_N: tl.constexpr):
    return tl.load(wp) if EVEN_N else tl.load(wp, mask=mask[:, None], other=0)


@triton.jit
def _group(g_ptr, row, rn, mask, N, BF16: tl.constexpr, EVEN_N: tl.constexpr):
    """Scale (16-bit) and zero (fp32) of a group, [BN] each, which lie side by side in one 32-bit word.

    An asynchronous copy moves 4 bytes or more: apart, scales and zeros would be fetched by loads that the pipeline
    leaves where they are needed, and every group would wait for memory.
    """
    DTYPE: tl.constexpr = tl.bfloat16 if BF16 else tl.float16
    gp = g_ptr + row * N + rn
    pair = tl.load(gp) if EVEN_N else tl.load(gp, mask=mask, other=0)
    scale = pair.to(tl.int16).to(DTYPE, bitcast=True)
    zero = (pair >> 16).to(tl.int16).to(DTYPE, bitcast=True)
    return scale, zero.to(tl.float32)


@triton.jit
def _offset(zero, P: tl.constexpr, BITS: tl.constexpr, BF16: tl.constexpr):
    """-(base * 2^-e + zero) of plane P in the 16-bit type, a whole number, or -zero * 2^-6 for bytes in bf16: exact."""
    BASE: tl.constexpr = 128.0 if BF16 else 1024.0
    DTYPE: tl.constexpr = tl.bfloat16 if BF16 else tl.float16
    whole = -(BASE / _exponent(P, BITS, BF16)) - zero
    return (zero * -(2.0**-6) if BITS == 8 and BF16 else whole).to(DTYPE)


@triton.jit
def _factor(scale, BITS: tl.constexpr, BF16: tl.constexpr):
    """What multiplies the code of `_plane`, less its zero: the scale, times 2^6 for bytes in bf16."""
    return (scale.to(tl.float32) * 2.0**6).to(tl.bfloat16) if BITS == 8 and BF16 else scale
