"""Which plan is fastest for a layer at each M, measured: the rows of a table (`kernels.tables`)."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vlmq_serve.format.errors import VLMQError
from vlmq_serve.format.scheme import Scheme
from vlmq_serve.kernels.bench.candidates import Call, copies
from vlmq_serve.kernels.bench.layers import Layer, random_weight
from vlmq_serve.kernels.bench.measure import CHECKED_FEATURES, CHECKED_ROWS, ERROR_LIMIT, Settings
from vlmq_serve.kernels.bench.timing import cache_bytes, median_seconds
from vlmq_serve.kernels.gpu import Gpu, gpu_of
from vlmq_serve.kernels.plan import AUTO, DENSE, MAX_SPLIT, MAX_TILES, Plan, Shape, plan, programs_of
from vlmq_serve.kernels.planes import prepare_planes
from vlmq_serve.kernels.tables import Row, row_of
from vlmq_serve.kernels.tiles import Tile, gemv_tiles, narrow_tiles, tiles

if TYPE_CHECKING:
    from vlmq_serve.kernels.triton_path import Operand

logger = logging.getLogger(__name__)

RESIDENT_BLOCKS = 4
"""Programs per multiprocessor up to which a split K is measured."""
DENSE_FROM = 64
"""Rows of x from which the dense product is worth a measurement."""


@dataclass(frozen=True)
class Tuned:
    """The fastest plan of a cell: its row, seconds of one call, and seconds of the plan that the rules choose."""

    row: Row
    seconds: float
    ruled_seconds: float


def options(rows: int, shape: Shape, gpu: Gpu) -> list[Plan]:
    """Plans worth a measurement, that of the rules first: the tiles that hold `rows` or half of them, K split as the
    rules say, half and twice as often; both ways to add; GEMV up to two rows; the dense product from DENSE_FROM on."""
    ruled = plan(rows, replace(shape, measured=()), gpu)
    family = tiles(shape.bits, gpu.arch)
    at = next((i for i, t in enumerate(family) if rows <= t.rows_m), len(family) - 1)
    near = [*family[max(0, at - 1) : at + 1], *[t for t in narrow_tiles(shape.bits, gpu.arch) if t.rows_m >= rows][:1]]
    near += [t for t in gemv_tiles(shape.bits) if rows <= t.rows_m]
    found = [ruled]
    for tile in near:
        for split in _splits(rows, shape, gpu, tile):
            found += [Plan(tile, split)] if split == 1 else [Plan(tile, split), Plan(tile, split, 0, False)]
    if rows >= DENSE_FROM:
        found.append(plan(rows, shape, gpu, DENSE))
    return list(dict.fromkeys(found))


def _splits(rows: int, shape: Shape, gpu: Gpu, tile: Tile) -> list[int]:
    programs = programs_of(rows, shape, tile)
    most = min(shape.slabs, MAX_SPLIT, max(1, RESIDENT_BLOCKS * gpu.processors // programs))
    return [s for s in (1, 2, 4, 8) if s <= most and programs <= MAX_TILES][-3:] or [1]


def tune_layer(layer: Layer, rows: Sequence[int], schemes: Sequence[str], settings: Settings) -> Iterator[list[Tuned]]:
    """One list per M, an entry per scheme. Raises `VLMQError` where no kernel is right."""
    from vlmq_serve.kernels import triton_path

    weights = []
    for text in schemes:
        scheme = Scheme.parse(text)
        packed = random_weight(layer, scheme, settings.dtype, settings.device)
        group = scheme.group_length(layer.in_features)
        first = triton_path.Operand(
            *prepare_planes(packed, settings.dtype), scheme.bits, group, layer.out_features, layer.in_features
        )
        size = first.qdata.numel() * 2 + first.scales.numel() * 2
        number = copies(size, 4 * cache_bytes(settings.device))
        clones = [replace(first, qdata=first.qdata.clone(), scales=first.scales.clone()) for _ in range(number)]
        weights.append((clones, packed.dequantize()[:CHECKED_FEATURES].double()))
    for count in rows:
        x = torch.randn(count, layer.in_features, generator=torch.Generator().manual_seed(count))
        x = x.to(settings.device, settings.dtype)
        yield [_tune_cell(x, clones, exact, settings) for clones, exact in weights]


def _tune_cell(x: Tensor, clones: "Sequence[Operand]", exact: Tensor, settings: Settings) -> Tuned:
    from vlmq_serve.kernels import triton_path

    gpu = gpu_of(settings.device)
    shape = triton_path.shape_of(clones[0])
    expected = x[:CHECKED_ROWS].double() @ exact.T
    calls: dict[str, tuple[tuple[Call, ...], Tensor]] = {}
    plans: dict[str, Plan] = {}
    for chosen in options(x.shape[0], shape, gpu):
        got = triton_path.run(x, clones[0], chosen)[:CHECKED_ROWS, : exact.shape[0]].double()
        error = float((got - expected).norm() / expected.norm())
        if not error <= ERROR_LIMIT:
            logger.warning("wrong, and not in the table: %s at M=%d: error %.2g", chosen, x.shape[0], error)
            continue
        name = str(len(plans))
        plans[name] = chosen
        calls[name] = (tuple(_call(clone, chosen) for clone in clones), x)
    if not calls:
        raise VLMQError(
            f"W{shape.bits} N={shape.out_features} K={shape.in_features} M={x.shape[0]}: every kernel is wrong: there "
            "is no plan to choose; see the warnings above, and run tests/kernels/test_gpu.py"
        )
    times = median_seconds(calls, settings.device, settings.seconds)
    best = min(times, key=lambda name: times[name])
    ruled = plan(x.shape[0], replace(shape, measured=()), gpu, AUTO)
    ruled_seconds = next((times[name] for name, p in plans.items() if p == ruled), float("nan"))
    key = (clones[0].bits, clones[0].out_features, clones[0].in_features)
    return Tuned(row_of(key, x.shape[0], plans[best]), times[best], ruled_seconds)


def _call(weight: "Operand", chosen: Plan) -> Call:
    from vlmq_serve.kernels import triton_path

    return lambda x: triton_path.run(x, weight, chosen)
