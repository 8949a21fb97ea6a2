"""Which kernel of the Triton family serves a product, by M, N, K, bits and GPU: a measured table or fixed rules.

    M           what runs                                         why
    1 .. 16     fused, 8 or 16 rows, K split                      bound by reading the codes: fill the device
    .. 512      fused, pipelined, 32 to 128 rows, K split         codes are decoded once per tile of rows
    above       dequantize once into scratch, then torch.mm       decoding again for every tile costs more than that

Nothing is tuned at run time. No GPU has been measured yet: the rules follow from counts of bytes and instructions, as
each says, and serve wherever no table (`tables`) knows the layer.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from vlmq_serve.kernels.gpu import Gpu
from vlmq_serve.kernels.tiles import SHARED_MEMORY, Tile, gemv_tiles, tiles

AUTO, FUSED, DENSE, GEMV, SECOND_LAUNCH = "auto", "fused", "dense", "gemv", "second_launch"
KINDS = (AUTO, FUSED, DENSE, GEMV, SECOND_LAUNCH)
"""AUTO: table, then rules; FUSED, DENSE: one half of the rules; GEMV: `gemv_kernel` up to two rows, then AUTO;
SECOND_LAUNCH: as AUTO, and partial sums of a split K are added by a kernel of their own."""

DENSE_ABOVE = 512
"""Rows of x above which weights are dequantized once.

Writing and reading the 16-bit weight costs (2 + bits/8) N K bytes; a fused kernel that reaches a share u of the speed
of the dense product costs (1/u - 1) 2 M N K operations more than that. At 3.0 TB/s, 800 TFLOP/s and u = 0.65 (the
best published fused kernels on an H100) both are equal at M near 600, at 1.6 TB/s and 250 TFLOP/s (A100) near 360.
"""

MAX_SPLIT = 8
ARRIVALS = 64
"""What the programs of a tile add to its counter together; a multiple of every split."""
MAX_TILES = 4096
"""Tiles of y that have a counter; K is not split where there are more, as they fill any GPU."""
RESIDENT_ROWS = 16
"""Tiles up to this many rows fit a multiprocessor of 8.0 or 9.0 twice (shared memory in the static table)."""

SCRATCH_MAX = 144 << 20
SCRATCH_SHARE = 128
"""Scratch is a 128th of the GPU's memory, at most 144 MiB: the 16-bit down projection of a 7B model, or half of its
gate_up, so that each part of the dense product still fills a large GPU."""

ROW_STEP = 128


@dataclass(frozen=True)
class Plan:
    """A fused product with `tile` and K split `split` times, or with no tile a dense one of `step` rows at a time.

    one_launch: partial sums of a split K are added by the program that arrives last, not by a second launch. The
    default, as a launch costs about as long as the product of a small layer at few rows; the same sums in the same
    order either way (`triton_reduce`).
    """

    tile: Tile | None
    split: int = 1
    step: int = 0
    one_launch: bool = True

    @property
    def variant(self) -> tuple[object, ...]:
        """Equal for plans of one layer that run the same compiled kernels."""
        return (self.tile, self.split > 1 and (1 if self.one_launch else 2))


@dataclass(frozen=True)
class Shape:
    """A weight as the choice sees it: N, K, the slabs it is stored in, its width, and plans measured for it by M."""

    out_features: int
    in_features: int
    slabs: int
    bits: int
    measured: tuple[tuple[int, Plan], ...] = ()


def plan(rows: int, shape: Shape, gpu: Gpu, kind: str = AUTO) -> Plan:
    """How to multiply `rows` rows of x with the weight; `kind` is one of KINDS."""
    if kind == GEMV and rows <= gemv_tiles(shape.bits)[-1].rows_m:
        return _fused(rows, shape, gpu, gemv_tiles(shape.bits))
    if kind in (FUSED, DENSE):
        return _ruled(rows, shape, gpu, kind)
    found = next((found for most, found in shape.measured if rows <= most), None)
    chosen = _fitted(rows, shape, gpu, found) if found else _ruled(rows, shape, gpu, AUTO)
    return Plan(chosen.tile, chosen.split, chosen.step, False) if kind == SECOND_LAUNCH else chosen


def _ruled(rows: int, shape: Shape, gpu: Gpu, kind: str) -> Plan:
    if kind == DENSE or (kind == AUTO and rows > DENSE_ABOVE):
        return Plan(None, step=dense_step(shape.out_features, shape.in_features, scratch_bytes(gpu.memory)))
    return _fused(rows, shape, gpu, tiles(shape.bits, gpu.arch))


def _fused(rows: int, shape: Shape, gpu: Gpu, family: tuple[Tile, ...]) -> Plan:
    tile = next((t for t in family if rows <= t.rows_m), family[-1])
    programs = programs_of(rows, shape, tile)
    twice = tile.rows_m <= RESIDENT_ROWS and gpu.arch in SHARED_MEMORY
    return Plan(tile, num_splits(programs, shape.slabs, gpu.processors * (2 if twice else 1)))


def _fitted(rows: int, shape: Shape, gpu: Gpu, found: Plan) -> Plan:
    """A measured plan within the bounds of this product: M may be less than the one that was measured."""
    if found.tile is None:
        return _ruled(rows, shape, gpu, DENSE)
    programs, sums = programs_of(rows, shape, found.tile), 4 * found.tile.rows_m * found.tile.rows_n
    split = found.split if programs <= MAX_TILES else 1
    while split > 1 and (split > shape.slabs or programs * split * sums > scratch_bytes(gpu.memory)):
        split //= 2
    return Plan(found.tile, split, 0, found.one_launch)


def programs_of(rows: int, shape: Shape, tile: Tile) -> int:
    """Tiles of y."""
    return -(-shape.out_features // tile.rows_n) * -(-rows // tile.rows_m)


def num_splits(programs: int, slabs: int, resident: int) -> int:
    """K ranges per tile, a power of two, so that the programs come close to those that can be resident at once."""
    split = 1
    while split * 2 <= min(resident // max(1, programs), slabs, MAX_SPLIT) and programs <= MAX_TILES:
        split *= 2
    return split


def representatives(shape: Shape, gpu: Gpu, kind: str = AUTO) -> Mapping[tuple[object, ...], int]:
    """For every variant that any M can run, one such M: what has to be compiled before the first request."""
    edges = {edge for most, _ in shape.measured for edge in (most, most + 1)}
    found: dict[tuple[object, ...], int] = {}
    for rows in sorted({*range(1, DENSE_ABOVE + 2), *range(DENSE_ABOVE, 1 << 14, ROW_STEP), *edges}):
        found.setdefault(plan(rows, shape, gpu, kind).variant, rows)
    return found


def scratch_bytes(memory: int) -> int:
    """Scratch for a GPU with this many bytes of memory, rounded down to MiB."""
    return min(SCRATCH_MAX, memory // SCRATCH_SHARE >> 20 << 20)


def dense_step(out_features: int, in_features: int, scratch: int) -> int:
    """Rows of the weight that are dequantized at a time: equal parts of whole tiles that fit the scratch."""
    most = max(ROW_STEP, scratch // (2 * in_features) // ROW_STEP * ROW_STEP)
    parts = max(1, -(-out_features // most))
    return -(-out_features // parts // ROW_STEP) * ROW_STEP if parts > 1 else out_features


def describe(shape: Shape, gpu: Gpu, kind: str) -> str:
    """For the log: what serves this layer at which M."""
    parts = -(-shape.out_features // dense_step(shape.out_features, shape.in_features, scratch_bytes(gpu.memory)))
    dense = f"dequantized in {parts} part{'s' if parts > 1 else ''}"
    ruled = f"fused to M={DENSE_ABOVE}, {dense} above"
    if shape.measured and kind in (AUTO, GEMV, SECOND_LAUNCH):
        ruled = f"as measured to M={shape.measured[-1][0]}, then {ruled}"
    texts = {FUSED: "fused", DENSE: dense, GEMV: f"gemv to M={gemv_tiles(shape.bits)[-1].rows_m}, {ruled}"}
    return texts.get(kind, ruled)
