"""Runs a variant of the static table: its PTX on a weight and random x, launched as `triton_path` launches it."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch

from tests.kernels.ptx.launch import Launch
from tests.kernels.ptx.memory import UNWRITTEN, Traffic
from tests.kernels.ptx.program import parse
from tests.kernels.weights import exact_weight, random_weight
from vlmq_serve.format.weight import PackedWeight
from vlmq_serve.kernels.compile_report import ADD, WRITE, Variant, compiled
from vlmq_serve.kernels.plan import ARRIVALS
from vlmq_serve.kernels.planes import SLABS, prepare_planes, slab_length

TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
STEPS = 5
"""Slabs of K: more than a pipeline has stages, and not the same number for each part of a split K."""
ROUNDS = 3
"""Launches that have used the counters of tiles before."""


@dataclass(frozen=True)
class Result:
    """y as the kernel left it, [M, N] or the weight [N, K], and in fp64 what it should be; what memory had to do;
    how many launches the counters of tiles have seen."""

    y: torch.Tensor
    expected: torch.Tensor
    memory: Traffic
    shared: Traffic
    rounds: np.ndarray


def case(variant: Variant) -> tuple[Variant, PackedWeight, int, int]:
    """What `run` takes for this variant: a weight, rows of x that do not fill their last tile, parts of K.

    Two tiles of N, and two of M where they are small. Tails of K need groups that are shorter than every slab, so
    tails are those of group 32, whatever the variant's name says.
    """
    bits, tile = variant.bits, variant.tile
    cols, features = STEPS * SLABS[bits][0], 2 * tile.rows_n
    if variant.tails:
        variant, cols, features = replace(variant, group_size=32), cols - 32, features - 24
    weight = random_weight(features, cols, bits, variant.group_size, False, TYPES[variant.dtype])
    rows = tile.rows_m if tile.gemv else tile.rows_m + 3 if tile.rows_m == 8 else tile.rows_m - 3
    return variant, weight, rows, 2 if variant.split else 1


def run(
    variant: Variant, weight: PackedWeight, rows: int, splits: int, seed: int, late: bool,
    edit: Callable[[str], str] = str,
) -> Result:  # fmt: skip
    """`seed` decides who runs when, `late` when asynchronous work is done; `edit` may damage the PTX."""
    if variant.kernel == ADD:
        return run_sum(variant, rows, weight.shape[0], splits, seed)
    dtype, tile, (features, cols) = TYPES[variant.dtype], variant.tile, weight.shape
    writes = variant.kernel == WRITE
    words, scales = prepare_planes(weight, dtype)
    kernel = compiled(variant, slab_length(cols, weight.scheme.group_length(cols), variant.bits))
    launch = Launch(parse(edit(kernel.asm["ptx"])), variant.warps, kernel.metadata.shared)
    x = torch.randn(rows, cols, generator=torch.Generator().manual_seed(rows)).to(dtype)
    y = np.full((features, cols) if writes else (rows, features), UNWRITTEN * 0x101, np.uint16)
    grid = (-(-features // tile.rows_n), words.shape[0] if writes else -(-rows // tile.rows_m), splits)
    tiles = grid[0] * grid[1]
    counters = np.full(tiles, ROUNDS * ARRIVALS, np.int32)
    at = [launch.memory.add(t.view(torch.int16).numpy()) for t in (words, scales)]
    if writes:
        arguments = [*at, launch.memory.add(y), 0, features, features, cols]
    else:
        parts = np.full(tiles * splits * tile.rows_m * tile.rows_n, np.nan, np.float32)
        inputs = [launch.memory.add(x.view(torch.int16).numpy()), *at]
        outputs = [launch.memory.add(a) for a in (y, parts, counters)]
        arguments = [*inputs, *outputs, rows, features, cols, words.shape[0], splits]
    shared = launch.run(grid, arguments, seed, late)
    exact = exact_weight(weight)
    got = torch.from_numpy(y.view(np.int16)).view(dtype)
    expected = exact if writes else x.double() @ exact.T
    return Result(got, expected, launch.memory.traffic, shared.traffic, counters / ARRIVALS)


def run_sum(variant: Variant, rows: int, features: int, splits: int, seed: int) -> Result:
    """The kernel that only adds: random partial sums, tile by tile, and in `expected` their sum in fp32, in order."""
    tile = variant.tile
    grid = (-(-features // tile.rows_n), -(-rows // tile.rows_m), 1)
    parts = torch.randn(grid[1], grid[0], splits, tile.rows_n, tile.rows_m, generator=torch.Generator().manual_seed(0))
    kernel = compiled(variant, SLABS[variant.bits][0])
    launch = Launch(parse(kernel.asm["ptx"]), variant.warps, kernel.metadata.shared)
    y = np.full((rows, features), UNWRITTEN * 0x101, np.uint16)
    at = [launch.memory.add(a) for a in (parts.numpy(), y)]
    shared = launch.run(grid, [*at, rows, features, splits], seed, late=False)
    total = torch.zeros_like(parts[:, :, 0])
    for part in parts.unbind(2):
        total += part
    whole = total.permute(0, 3, 1, 2).reshape(grid[1] * tile.rows_m, -1)[:rows, :features]
    got = torch.from_numpy(y.view(np.int16)).view(TYPES[variant.dtype])
    return Result(got, whole.double(), launch.memory.traffic, shared.traffic, np.empty(0))
