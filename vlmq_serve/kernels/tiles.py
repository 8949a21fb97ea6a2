"""Tile shapes of the Triton kernel by M, and how far K is split: fixed rules, nothing tuned at run time."""

from dataclasses import dataclass
from functools import lru_cache

import torch

MAX_SPLIT = 8
DEFAULT_PROCESSORS = 108
"""Multiprocessors assumed where no device can be asked (A100)."""


@dataclass(frozen=True)
class Tile:
    """One compiled shape: rows_m of x by rows_n of the weight, warps, and stages of the load pipeline."""

    rows_m: int
    rows_n: int
    warps: int
    stages: int


TILES = (Tile(16, 128, 4, 3), Tile(32, 128, 4, 3), Tile(64, 128, 4, 2), Tile(128, 128, 8, 2))


def choose_tile(rows: int) -> Tile:
    """The smallest tile that holds `rows` rows of x, else the largest."""
    return next((t for t in TILES if rows <= t.rows_m), TILES[-1])


def num_splits(programs: int, slabs: int, device: torch.device) -> int:
    """K ranges per tile, a power of two, so that the programs fill the device about once."""
    wanted = _processors(device) // max(1, programs)
    split = 1
    while split * 2 <= min(wanted, slabs, MAX_SPLIT):
        split *= 2
    return split


@lru_cache(maxsize=16)
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return DEFAULT_PROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
