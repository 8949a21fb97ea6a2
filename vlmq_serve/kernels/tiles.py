"""Tile shapes of the Triton kernel by architecture and width, as the static table found them to fit."""

from dataclasses import dataclass

SHARED_MEMORY = {80: 163 << 10, 90: 227 << 10}
SHARED_MEMORY_ELSEWHERE = 99 << 10
"""Bytes that one block can have, by architecture (CUDA programming guide, compute capabilities); 99 KiB is the
figure of 8.6, 8.9 and 12.0, and what any other architecture is trusted with."""


@dataclass(frozen=True)
class Tile:
    """One compiled shape: rows_m of x by rows_n of the weight, warps, and stages of the load pipeline."""

    rows_m: int
    rows_n: int
    warps: int
    stages: int


DEQUANTIZE = Tile(0, 64, 4, 1)
"""The kernel that only writes weights takes no rows of x."""


def tiles(bits: int, arch: int) -> tuple[Tile, ...]:
    """The family for one width on one architecture, by growing M.

    Fewest warps and most stages that neither spill nor overrun shared memory in the static table, tails of N and K
    included. Hopper's operands of the widest tile take one stage at 2 and 3 bits (slabs of 512). Elsewhere the
    fragments of weights and sums share the registers: more warps from 64 rows on, at 2 and 3 bits from 32, and no tile
    of 128 rows at 3 bits, whose three words per row are too many then; on sm_80 these leave two stages at 16 rows.
    """
    few = (Tile(8, 128, 4, 3), Tile(16, 128, 4, 2 if (bits, arch) == (3, 80) else 3))
    if arch == 90:
        return (*few, Tile(32, 128, 4, 3), Tile(64, 128, 4, 2), Tile(128, 128, 8, 2 if bits == 4 else 1))
    warps = 4 if bits == 4 else 8
    if arch == 80:
        many = (Tile(64, 128, 8, 2), Tile(128, 128, 8, 2))
        return (*few, Tile(32, 128, warps, 3), *many[: 1 if bits == 3 else 2])
    return (*few, Tile(32, 128, warps, 2), Tile(64, 128, 8, 2))
