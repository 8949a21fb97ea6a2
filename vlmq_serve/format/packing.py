"""Dense bit packing of integer codes along K, both directions, vectorised.

32 codes fill exactly `bits` int32 words: code i occupies the bits [i*bits, (i+1)*bits) of a little-endian
stream, least significant bit first. W2 and W4 words equal the `pack-quantized` words of compressed-tensors;
W3 equals the dense layout that vLLM 0.32 allocates for it.
"""

import torch
from torch import Tensor

from vlmq_serve.format.errors import VLMQError
from vlmq_serve.format.scheme import ALLOWED_BITS, CODES_PER_BLOCK, WORD_BITS


def _check_bits(bits: int) -> None:
    if bits not in ALLOWED_BITS:
        raise VLMQError(f"bits: got {bits!r}, allowed {ALLOWED_BITS}")


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Pack codes [N, K] (any integer dtype, 0 <= code < 2^bits) into int32 [N, K*bits/32]."""
    _check_bits(bits)
    if codes.dim() != 2 or codes.shape[1] % CODES_PER_BLOCK:
        raise VLMQError(f"codes: got shape {tuple(codes.shape)}, expected [N, K] with K a multiple of 32")
    if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) >= 2**bits):
        raise VLMQError(f"codes: got values in [{int(codes.min())}, {int(codes.max())}], allowed [0, {2**bits - 1}]")
    rows, cols = codes.shape
    blocks = codes.to(torch.int64).reshape(rows, cols // CODES_PER_BLOCK, CODES_PER_BLOCK)
    # One spare word takes the (zero) overflow of the last code, so that the loop needs no special case.
    words = torch.zeros(rows, blocks.shape[1], bits + 1, dtype=torch.int64, device=codes.device)
    for index in range(CODES_PER_BLOCK):
        word, shift = divmod(index * bits, WORD_BITS)
        shifted = blocks[:, :, index] << shift
        words[:, :, word] |= shifted & 0xFFFFFFFF
        words[:, :, word + 1] |= shifted >> WORD_BITS
    return _to_int32(words[:, :, :bits]).reshape(rows, cols * bits // WORD_BITS)


def unpack_codes(qweight: Tensor, bits: int) -> Tensor:
    """Inverse of `pack_codes`: int32 [N, K*bits/32] to uint8 [N, K]."""
    _check_bits(bits)
    if qweight.dim() != 2 or qweight.dtype != torch.int32 or qweight.shape[1] % bits:
        got = f"{qweight.dtype} {tuple(qweight.shape)}"
        raise VLMQError(f"qweight: got {got}, expected int32 [N, words] with words a multiple of {bits}")
    rows = qweight.shape[0]
    words = qweight.to(torch.int64).reshape(rows, qweight.shape[1] // bits, bits) & 0xFFFFFFFF
    stream = torch.nn.functional.pad(words, (0, 1))
    codes = torch.empty(rows, words.shape[1], CODES_PER_BLOCK, dtype=torch.uint8, device=qweight.device)
    for index in range(CODES_PER_BLOCK):
        word, shift = divmod(index * bits, WORD_BITS)
        both = stream[:, :, word] | (stream[:, :, word + 1] << WORD_BITS)
        codes[:, :, index] = ((both >> shift) & (2**bits - 1)).to(torch.uint8)
    return codes.reshape(rows, qweight.shape[1] * WORD_BITS // bits)


def _to_int32(words: Tensor) -> Tensor:
    """Reinterpret unsigned 32-bit values held in int64 as int32."""
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
