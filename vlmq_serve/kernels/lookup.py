"""Rows of a packed table of embeddings: gathered as they are stored, then dequantized. Any device, any width.

vLLM looks embeddings up outside of compiled graphs where a model has images, so the work is done in few operations, and
many rows some at a time: what lies between codes and embeddings takes several times their room.
"""

import torch
from torch import Tensor

from vlmq_serve.format.scheme import CODES_PER_BLOCK, WORD_BITS

ROWS_AT_ONCE = 1024


def lookup(
    ids: Tensor, qweight: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, dtype: torch.dtype
) -> Tensor:  # fmt: skip
    """Rows `ids` (int64, any shape [...]) of a weight in checkpoint layout (`PackedWeight`; without zeros the middle
    code is the zero), [..., K] in `dtype`: computed in fp32 and rounded once."""
    if ids.numel() > ROWS_AT_ONCE:
        parts = [lookup(part, qweight, scales, zeros, bits, dtype) for part in ids.reshape(-1).split(ROWS_AT_ONCE)]
        return torch.cat(parts).reshape(*ids.shape, -1)
    groups, cols = scales.shape[1], qweight.shape[1] * WORD_BITS // bits
    codes = _codes(qweight[ids], bits)
    zero = 2 ** (bits - 1) if zeros is None else zeros[ids].to(torch.float32)[..., None]
    grouped = codes.to(torch.float32).reshape(*ids.shape, groups, cols // groups)
    return ((grouped - zero) * scales[ids].to(torch.float32)[..., None]).reshape(*ids.shape, cols).to(dtype)


def _codes(words: Tensor, bits: int) -> Tensor:
    """int32 [..., words] to int32 codes [..., K/32, 32]: code i of a block is its bits from i * bits on."""
    place = torch.arange(CODES_PER_BLOCK, device=words.device) * bits
    word, shift = place // WORD_BITS, (place % WORD_BITS).to(torch.int32)
    blocks = words.reshape(*words.shape[:-1], words.shape[-1] // bits, bits)
    if WORD_BITS % bits == 0:
        return (blocks[..., word] >> shift) & (2**bits - 1)
    # Bits of the first word that are a code's, then those of the next: an arithmetic shift would bring signs.
    first = torch.clamp(WORD_BITS - shift, max=bits)
    low = (blocks[..., word] >> shift) & ((1 << first) - 1)
    following = torch.clamp(word + 1, max=bits - 1)
    return low | ((blocks[..., following] & ((1 << (bits - first)) - 1)) << first)
