"""Which kernel of the Triton family serves a product, by M, N, K, bits and GPU: fixed rules, nothing tuned at run time.

    M           what runs                                         why
    1 .. 16     fused, 8 or 16 rows, K split                      bound by reading the codes: fill the device
    .. 512      fused, pipelined, 32 to 128 rows, K split         codes are decoded once per tile of rows
    above       dequantize once into scratch, then torch.matmul   decoding again for every tile costs more than that

No GPU has been measured yet. The rules follow from counts of bytes and instructions, as each says.
"""

from dataclasses import dataclass

from vlmq_serve.kernels.gpu import Gpu
from vlmq_serve.kernels.tiles import SHARED_MEMORY, Tile, tiles

AUTO, FUSED, DENSE = "auto", "fused", "dense"

DENSE_ABOVE = 512
"""Rows of x above which weights are dequantized once.

Writing and reading the 16-bit weight costs (2 + bits/8) N K bytes; a fused kernel that reaches a share u of the speed
of the dense product costs (1/u - 1) 2 M N K operations more than that. At 3.0 TB/s, 800 TFLOP/s and u = 0.65 (the
best published fused kernels on an H100) both are equal at M near 600, at 1.6 TB/s and 250 TFLOP/s (A100) near 360.
"""

MAX_SPLIT = 8
RESIDENT_ROWS = 16
"""Tiles up to this many rows fit a multiprocessor of 8.0 or 9.0 twice (shared memory in the static table)."""

SCRATCH_MAX = 144 << 20
SCRATCH_SHARE = 128
"""Scratch is a 128th of the GPU's memory, at most 144 MiB: the 16-bit down projection of a 7B model, or half of its
gate_up, so that each part of the dense product still fills a large GPU."""

ROW_STEP = 128


@dataclass(frozen=True)
class Plan:
    """A fused product with `tile` and K split `split` times, or with no tile a dense one of `step` rows at a time."""

    tile: Tile | None
    split: int = 1
    step: int = 0


def plan(rows: int, out_features: int, in_features: int, slabs: int, bits: int, gpu: Gpu, kind: str = AUTO) -> Plan:
    """How to multiply `rows` rows of x with a [N, K] weight stored in `slabs` slabs; `kind` forces one half."""
    if kind == DENSE or (kind == AUTO and rows > DENSE_ABOVE):
        return Plan(None, step=dense_step(out_features, in_features, scratch_bytes(gpu.memory)))
    family = tiles(bits, gpu.arch)
    tile = next((t for t in family if rows <= t.rows_m), family[-1])
    programs = -(-out_features // tile.rows_n) * -(-rows // tile.rows_m)
    twice = tile.rows_m <= RESIDENT_ROWS and gpu.arch in SHARED_MEMORY
    resident = gpu.processors * (2 if twice else 1)
    return Plan(tile, num_splits(programs, slabs, resident))


def num_splits(programs: int, slabs: int, resident: int) -> int:
    """K ranges per tile, a power of two, so that the programs come close to those that can be resident at once."""
    split = 1
    while split * 2 <= min(resident // max(1, programs), slabs, MAX_SPLIT):
        split *= 2
    return split


def scratch_bytes(memory: int) -> int:
    """Scratch for a GPU with this many bytes of memory, rounded down to MiB."""
    return min(SCRATCH_MAX, memory // SCRATCH_SHARE >> 20 << 20)


def dense_step(out_features: int, in_features: int, scratch: int) -> int:
    """Rows of the weight that are dequantized at a time: equal parts of whole tiles that fit the scratch."""
    most = max(ROW_STEP, scratch // (2 * in_features) // ROW_STEP * ROW_STEP)
    parts = max(1, -(-out_features // most))
    return -(-out_features // parts // ROW_STEP) * ROW_STEP if parts > 1 else out_features


def describe(out_features: int, in_features: int, gpu: Gpu, kind: str) -> str:
    """For the log: what serves this layer at which M."""
    parts = -(-out_features // dense_step(out_features, in_features, scratch_bytes(gpu.memory)))
    dense = f"dequantized in {parts} part{'s' if parts > 1 else ''}"
    texts = {AUTO: f"fused to M={DENSE_ABOVE}, {dense} above", FUSED: "fused", DENSE: dense}
    return texts[kind]
