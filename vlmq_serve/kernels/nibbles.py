"""Layout of the CPU paths: codes as nibbles, in blocks of rows, K running slowest inside a block.

`[N/B, K, B/2]` uint8; byte j of a block's column k holds row j (low nibble) and row j + B/2 (high nibble).
For B = 64 (AVX512) and B = 32 (AVX2) this is what torch's `_weight_int4pack_mm_for_cpu` reads, so one copy of
the codes serves both the int4 kernel and the dequantizing path. 4 bits per weight at every width.
"""

from functools import lru_cache

import torch
from torch import Tensor

ROW_PAD = 64
"""Rows are padded to a multiple of this, so that no kernel meets a partial block."""

NIBBLE_MID = 8
"""The int4 kernel computes (code - 8) * scale + offset."""

_BLOCKS = (64, 32)


def pack_nibbles(codes: Tensor, block: int) -> Tensor:
    """Codes [N, K] below 16 (N a multiple of `block`) to uint8 [N/block, K, block/2]."""
    rows, cols = codes.shape
    halves = codes.to(torch.uint8).reshape(rows // block, 2, block // 2, cols)
    return (halves[:, 0] | (halves[:, 1] << 4)).transpose(1, 2).contiguous()


def unpack_nibbles(packed: Tensor) -> Tensor:
    """Inverse of `pack_nibbles`: uint8 codes [N, K]."""
    halves = torch.stack((packed & 15, packed >> 4), dim=1)
    return halves.permute(0, 1, 3, 2).reshape(-1, packed.shape[1])


@lru_cache(maxsize=1)
def int4_kernel_block() -> int | None:
    """Rows per block that this machine's int4 kernel reads; None where torch has none, or one of another layout."""
    pack = getattr(torch.ops.aten, "_convert_weight_to_int4pack_for_cpu", None)
    if pack is None or not hasattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu"):
        return None
    rows, cols = 2 * ROW_PAD, 32
    codes = torch.randint(
        0, 16, (rows, cols), dtype=torch.int32, device="cpu", generator=torch.Generator("cpu").manual_seed(0)
    )
    try:
        theirs = pack(codes, 1).reshape(-1)
    except (RuntimeError, NotImplementedError):
        return None
    return next((b for b in _BLOCKS if torch.equal(pack_nibbles(codes, b).reshape(-1), theirs)), None)
