"""Layout of the Triton kernel: int16 words whose bit positions are contiguous ranges of K ("planes").

K is cut into slabs of KB codes, a slab into P planes of KW = KB / P codes. Word j of a row's slab holds one code
of every plane, code p being K index slab*KB + p*KW + j, so unpacking a bit position of a [N, KW] tile of words
yields weights for one contiguous range of x and nothing is ever interleaved or transposed. int16 and not int32:
two neighbours along K then share a register, which is the fragment layout of the matrix instructions.

    W8  1 word,  2 planes: code p in bits [8p, 8p+8)
    W4  1 word,  4 planes: code p in bits [4p, 4p+4)
    W2  1 word,  8 planes: code p in bits [2p, 2p+2)
    W3  3 words, 16 planes in two halves h of 8 codes, of which the first five are in word h in bits [3c, 3c+3), two in
        byte h of word 2 in bits [0, 3) and [3, 6); the last has bit 0 in bit 15 of word h, bits 1 and 2 in bits 6
        and 7 of that byte

So half of the planes is a byte of every word, or with 3 bits a word and a byte, and a kernel can take half a slab at a
time, half h looking like half 0 after a shift by 8h.

Words are stored [slabs, words, N, KW]: a tile of rows is one contiguous run, and a tensor-parallel shard is a
slice (rows) or a range of slabs (columns). Exactly 2, 3, 4 and 8 bits per weight where a slab divides K.
"""

import torch
from torch import Tensor

from vlmq_serve.format.packing import unpack_codes
from vlmq_serve.format.weight import PackedWeight

PLANES = {2: 8, 3: 16, 4: 4, 8: 2}
WORDS = {2: 1, 3: 3, 4: 1, 8: 1}
SLABS = {2: (512, 256, 128), 3: (512, 256), 4: (256, 128, 64), 8: (128, 64)}
"""Codes per slab, best first: as long as registers allow (4 and 8 bits) and planes of at least 16, which a matrix
instruction needs."""
CODES_AT_ONCE = 1 << 23
"""While repacking: some 12 bytes each for a moment."""


def slab_length(in_features: int, group_size: int, bits: int) -> int:
    """Codes per slab: the longest that divides K with planes inside one group, else the shortest (K is padded)."""
    fits = [s for s in SLABS[bits] if s // PLANES[bits] <= group_size]
    return next((s for s in fits if in_features % s == 0), fits[-1])


def pack_planes(codes: Tensor, bits: int, slab: int) -> Tensor:
    """Codes [N, K], K a multiple of `slab`, to int16 [K/slab, words, N, slab/planes]."""
    rows, cols = codes.shape
    planes = codes.to(torch.int32).reshape(rows, cols // slab, PLANES[bits], -1).permute(1, 2, 0, 3)
    words = torch.zeros(planes.shape[0], WORDS[bits], *planes.shape[2:], dtype=torch.int32, device=codes.device)
    for word, plane, shift, source, mask in bit_fields(bits):
        words[:, word] |= ((planes[:, plane] >> source) & mask) << shift
    return torch.where(words >= 2**15, words - 2**16, words).to(torch.int16)


def unpack_planes(words: Tensor, bits: int) -> Tensor:
    """Inverse of `pack_planes`: uint8 codes [N, K]."""
    slabs, _, rows, width = words.shape
    unsigned = words.to(torch.int32) & 0xFFFF
    planes = torch.zeros(slabs, PLANES[bits], rows, width, dtype=torch.int32, device=words.device)
    for word, plane, shift, source, mask in bit_fields(bits):
        planes[:, plane] |= ((unsigned[:, word] >> shift) & mask) << source
    return planes.permute(2, 0, 1, 3).reshape(rows, -1).to(torch.uint8)


def bit_fields(bits: int) -> list[tuple[int, int, int, int, int]]:
    """Where codes live: (word, plane, shift in the word, shift in the code, mask), covering all 16 bits of a word."""
    mask = 2**bits - 1
    if bits != 3:
        return [(0, plane, plane * bits, 0, mask) for plane in range(PLANES[bits])]
    fields = []
    for half in (0, 1):
        first, low = 8 * half, 8 * half
        fields += [(half, first + c, 3 * c, 0, mask) for c in range(5)]
        fields += [(2, first + 5, low, 0, mask), (2, first + 6, low + 3, 0, mask)]
        fields += [(half, first + 7, 15, 0, 1), (2, first + 7, low + 6, 1, 3)]
    return fields


def _repacked(weight: PackedWeight, slab: int) -> Tensor:
    """The words of a weight, K padded to whole slabs; some rows at a time, as codes are wide integers on the way."""
    (rows, cols), bits = weight.shape, weight.scheme.bits
    pad = -cols % slab
    shape = ((cols + pad) // slab, WORDS[bits], rows, slab // PLANES[bits])
    words = torch.empty(shape, dtype=torch.int16, device=weight.qweight.device)
    step = max(1, CODES_AT_ONCE // cols)
    for start in range(0, rows, step):
        codes = unpack_codes(weight.qweight[start : start + step], bits)
        words[:, :, start : start + step] = pack_planes(torch.nn.functional.pad(codes, (0, pad)), bits, slab)
    return words


def prepare_planes(weight: PackedWeight, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """For the Triton kernels: words [slabs, words, N, KW], and scales with zeros in `dtype`, [groups, N, 2].

    Zeros are whole numbers and exact in both 16-bit types; symmetric codes have the same everywhere. Padding of K has
    scale 0.
    """
    bits = weight.scheme.bits
    cols = weight.shape[1]
    group = weight.scheme.group_length(cols)
    slab = slab_length(cols, group, bits)
    pad = -cols % slab
    words = _repacked(weight, slab)
    scales = weight.scales.to(dtype)
    middle = torch.full_like(scales, weight.scheme.mid_code)
    zeros = middle if weight.zeros is None else weight.zeros.to(dtype)
    # One group for the whole row serves the padding too: x is masked there.
    extra = 0 if scales.shape[1] == 1 else -(-(cols + pad) // group) - scales.shape[1]
    both = torch.stack((scales.t(), zeros.t()), -1)
    return words, torch.nn.functional.pad(both, (0, 0, 0, 0, 0, extra)).contiguous()
