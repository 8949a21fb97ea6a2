"""Tile shapes of the Triton kernels by architecture and width, as the static table found them to fit."""

from dataclasses import dataclass

SHARED_MEMORY = {80: 163 << 10, 90: 227 << 10}
SHARED_MEMORY_ELSEWHERE = 99 << 10
"""Bytes that one block can have, by architecture (CUDA programming guide, compute capabilities); 99 KiB is the
figure of 8.6, 8.9 and 12.0, and what any other architecture is trusted with."""

GEMV_ROWS = 2
"""A tile of this many rows of x or fewer is one of `gemv_kernel`."""


@dataclass(frozen=True)
class Tile:
    """One compiled shape: rows_m of x by rows_n of the weight, warps, and stages of the load pipeline.

    parts: steps of the pipeline per slab of K, 1 or 2.
    """

    rows_m: int
    rows_n: int
    warps: int
    stages: int
    parts: int = 1

    @property
    def gemv(self) -> bool:
        """Whether `gemv_kernel` takes it, and not `gemm_kernel`."""
        return self.rows_m <= GEMV_ROWS


SUM_WARPS = 8
"""Of the kernel that only adds partial sums, whatever the tile: with fewer, tails of 32 rows spill."""

DEQUANTIZE = Tile(0, 64, 4, 1)
"""The kernel that only writes weights takes no rows of x."""


def tiles(bits: int, arch: int) -> tuple[Tile, ...]:
    """The family for one width on one architecture, by growing M.

    Fewest warps and most stages that neither spill nor overrun shared memory in the static table, tails of N and K and
    a split K included. The widest tile takes half a slab at a time at 2 and 3 bits: x for a slab of 512 would leave
    Hopper's shared memory room for one stage, that is no pipeline, and fill the registers elsewhere, where the
    fragments of weights and sums share them: hence more warps there, from 64 rows on, at 2 and 3 bits from 32. Slabs
    of 8 bits are half as long as those of 4: less in registers, so no more warps at 64 rows, and on 8.0 and 9.0 a stage
    more, which reaches as far ahead.
    """
    short = bits in (4, 8)
    deep = 3 if bits == 8 and arch in SHARED_MEMORY else 2
    widest = Tile(128, 128, 8, deep, 1 if short else 2)
    few = (Tile(8, 128, 4, 3), Tile(16, 128, 4, 2 if (bits, arch) == (3, 80) else 3))
    if arch == 90:
        return (*few, Tile(32, 128, 4, 3), Tile(64, 128, 8 if bits == 2 else 4, deep), widest)
    medium = (Tile(32, 128, 4 if short else 8, 3 if arch == 80 else 2), Tile(64, 128, 4 if bits == 8 else 8, deep))
    # 8.9 has the registers of 8.0, but the compiler spills the widest tile of 4 and of 8 bits there.
    return (*few, *medium) if short and arch != 80 else (*few, *medium, widest)


def gemv_tiles(bits: int) -> tuple[Tile, ...]:
    """Tiles without matrix instructions, for one row of x and, at 2 and 4 bits, where they do not spill, for two: no
    rule chooses them, a table may."""
    one = Tile(1, 128, 4, 3)
    return (one, Tile(2, 64, 4, 2)) if bits in (2, 4) else (one,)


def narrow_tiles(bits: int, arch: int) -> tuple[Tile, ...]:
    """Tiles of half the width of the weight for few rows, which need less of a split K: only a table chooses them."""
    return tuple(Tile(t.rows_m, 64, t.warps, t.stages) for t in tiles(bits, arch)[:2])


def known_tiles(bits: int, arch: int) -> tuple[Tile, ...]:
    """Every tile that a table may name, each with its rows in the static table."""
    return (*gemv_tiles(bits), *tiles(bits, arch), *narrow_tiles(bits, arch))
