"""Tile shapes of the Triton kernel by M, and how far K is split: fixed rules, nothing tuned at run time."""

from dataclasses import dataclass
from functools import lru_cache

import torch

MAX_SPLIT = 8
MIN_ARCH = 80
ASSUMED_ARCH = 80
ASSUMED_PROCESSORS = 108
"""Where no device can be asked (the interpreter): an A100."""

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


def tiles(bits: int, arch: int) -> tuple[Tile, ...]:
    """The family for one width on one architecture, by growing M.

    Fewest warps and most stages that neither spill nor overrun shared memory in the static table, tails of N and K
    included. Hopper's operands of the widest tile take one stage at 2 and 3 bits (slabs of 512). Elsewhere the
    fragments of weights and sums share the registers: more warps from 64 rows on, at 2 and 3 bits from 32, and no tile
    of 128 rows at 3 bits, whose three words per row are too many then.
    """
    if arch == 90:
        few = (Tile(16, 128, 4, 3), Tile(32, 128, 4, 3))
        return (*few, Tile(64, 128, 4, 2), Tile(128, 128, 8, 2 if bits == 4 else 1))
    warps = 4 if bits == 4 else 8
    if arch == 80:
        many = (Tile(64, 128, 8, 2), Tile(128, 128, 8, 2))
        return (Tile(16, 128, 4, 3), Tile(32, 128, warps, 3), *many[: 1 if bits == 3 else 2])
    return (Tile(16, 128, 4, 3), Tile(32, 128, warps, 2), Tile(64, 128, 8, 2))


def choose_tile(rows: int, bits: int, device: torch.device) -> Tile:
    """The smallest tile of the device's family that holds `rows` rows of x, else the largest."""
    family = tiles(bits, device_arch(device))
    return next((t for t in family if rows <= t.rows_m), family[-1])


def num_splits(programs: int, slabs: int, device: torch.device) -> int:
    """K ranges per tile, a power of two, so that the programs fill the device about once."""
    wanted = _processors(device) // max(1, programs)
    split = 1
    while split * 2 <= min(wanted, slabs, MAX_SPLIT):
        split *= 2
    return split


@lru_cache(maxsize=16)
def device_arch(device: torch.device) -> int:
    """Compute capability times ten, for example 90."""
    if device.type != "cuda":
        return ASSUMED_ARCH
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@lru_cache(maxsize=16)
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return ASSUMED_PROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
