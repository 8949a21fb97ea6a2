"""Which kernel of the Triton family serves which product: pure functions, for GPUs that are not here."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vlmq_serve.kernels import scratch
from vlmq_serve.kernels.bench.layers import LAYERS
from vlmq_serve.kernels.bench.tuning import options
from vlmq_serve.kernels.gpu import ASSUMED, Gpu, gpu_of
from vlmq_serve.kernels.plan import (
    AUTO,
    DENSE,
    DENSE_ABOVE,
    FUSED,
    GEMV,
    KINDS,
    MAX_SPLIT,
    MAX_TILES,
    SCRATCH_MAX,
    SECOND_LAUNCH,
    Plan,
    Shape,
    dense_step,
    describe,
    plan,
    programs_of,
    representatives,
    scratch_bytes,
)
from vlmq_serve.kernels.planes import slab_length
from vlmq_serve.kernels.tiles import Tile, gemv_tiles, known_tiles, tiles

pytestmark = pytest.mark.unit

H100 = Gpu(90, 132, 80 << 30)
A100 = Gpu(80, 108, 40 << 30)
RTX_4090 = Gpu(89, 128, 24 << 30)


def shape(out_features: int, in_features: int, bits: int, measured: tuple[tuple[int, Plan], ...] = ()) -> Shape:
    count = -(-in_features // slab_length(in_features, 128, bits))
    return Shape(out_features, in_features, count, bits, measured)


@pytest.mark.parametrize("gpu", [H100, A100, RTX_4090], ids=lambda g: str(g.arch))
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_tile_grows_with_rows_and_the_dense_product_takes_over(gpu: Gpu, bits: int) -> None:
    family = tiles(bits, gpu.arch)
    for rows in range(1, DENSE_ABOVE + 2, 7):
        chosen = plan(rows, shape(3584, 3584, bits), gpu)
        assert chosen.tile is not None
        smallest = next((t for t in family if t.rows_m >= rows), family[-1])
        assert chosen.tile == smallest
    assert plan(DENSE_ABOVE + 1, shape(3584, 3584, bits), gpu).tile is None
    assert plan(16384, shape(3584, 3584, bits), gpu).tile is None


def test_narrow_layers_are_split_along_k_and_wide_ones_are_not() -> None:
    """qkv of the 7B has 36 tiles of N for 132 processors, gate_up 296; a K of 7 slabs takes 4 parts at most."""
    assert plan(1, shape(4608, 3584, 2), H100).split == 4
    assert plan(1, shape(3584, 18944, 4), H100).split == 8
    assert plan(1, shape(37888, 3584, 4), H100).split == 1
    assert plan(512, shape(3584, 3584, 4), H100).split == 1


@given(
    rows=st.integers(1, 16384),
    out_features=st.integers(1, 1 << 17),
    in_features=st.integers(1, 1 << 10).map(lambda n: 32 * n),
    bits=st.sampled_from([2, 3, 4, 8]),
    gpu=st.sampled_from([H100, A100, RTX_4090, Gpu(75, 16, 4 << 30), Gpu(120, 170, 32 << 30)]),
)
def test_every_product_has_a_plan_within_bounds(
    rows: int, out_features: int, in_features: int, bits: int, gpu: Gpu
) -> None:
    weight = shape(out_features, in_features, bits)
    chosen = plan(rows, weight, gpu)
    room = scratch_bytes(gpu.memory)
    if chosen.tile is None:
        assert rows > DENSE_ABOVE
        assert 0 < chosen.step <= max(out_features, 128)
        assert 2 * chosen.step * in_features <= max(room, 2 * 128 * in_features)
        return
    assert rows <= DENSE_ABOVE
    assert chosen.split in (1, 2, 4, 8)
    assert chosen.split <= min(weight.slabs, MAX_SPLIT)
    if chosen.split > 1:
        programs = programs_of(rows, weight, chosen.tile)
        assert programs <= MAX_TILES
        assert 4 * chosen.split * programs * chosen.tile.rows_m * chosen.tile.rows_n <= room


def test_parts_of_the_dense_product_cover_the_weight_evenly() -> None:
    for layer, memory in itertools.product(LAYERS, (8 << 30, 24 << 30, 80 << 30)):
        room = scratch_bytes(memory)
        step = dense_step(layer.out_features, layer.in_features, room)
        assert 2 * step * layer.in_features <= room
        parts = -(-layer.out_features // step)
        last = layer.out_features - (parts - 1) * step
        assert step - last < 128 * parts
    assert dense_step(3584, 18944, SCRATCH_MAX) == 3584
    assert dense_step(37888, 3584, SCRATCH_MAX) == 37888 // 2


def test_one_half_can_be_forced() -> None:
    weight = shape(3584, 3584, 4)
    assert plan(4096, weight, H100, FUSED).tile is not None
    assert plan(1, weight, H100, DENSE).tile is None
    assert [plan(m, weight, H100, GEMV).tile for m in (1, 2)] == list(gemv_tiles(4))
    assert plan(3, weight, H100, GEMV) == plan(3, weight, H100)
    assert plan(1, weight, H100).one_launch
    assert not plan(1, weight, H100, SECOND_LAUNCH).one_launch


MEASURED = ((1, Plan(gemv_tiles(4)[0], 4)), (8, Plan(Tile(8, 64, 4, 3), 8, 0, False)), (64, Plan(None)))


def test_a_measured_plan_serves_up_to_its_m_and_rules_serve_above() -> None:
    weight = shape(3584, 3584, 4, MEASURED)
    assert plan(1, weight, H100) == MEASURED[0][1]
    assert {plan(m, weight, H100) for m in range(2, 9)} == {MEASURED[1][1]}
    assert all(plan(m, weight, H100).tile is None for m in (9, 64))
    assert plan(64, weight, H100).step == 3584
    assert plan(65, weight, H100) == plan(65, shape(3584, 3584, 4), H100)
    assert plan(1, weight, H100, FUSED) == plan(1, shape(3584, 3584, 4), H100, FUSED)


def test_partial_sums_of_a_measured_split_fit_the_scratch() -> None:
    """8 times 4096 x 3584 fp32 sums are 448 MiB; a table may ask for it, a captured graph could not hold it."""
    tile = tiles(4, 90)[-1]
    chosen = plan(4096, shape(3584, 18944, 4, ((4096, Plan(tile, 8)),)), H100)
    assert chosen == Plan(tile, 2)
    assert 4 * 4096 * 3584 * chosen.split <= scratch_bytes(H100.memory) < 4 * 4096 * 3584 * 4


def test_a_measured_split_is_cut_to_the_slabs_there_are() -> None:
    weight = Shape(3584, 512, 2, 4, MEASURED)
    assert plan(1, weight, H100).split == 2
    assert plan(8, Shape(64 * (MAX_TILES + 1), 512, 2, 4, MEASURED), H100).split == 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "measured",
    [
        (),
        MEASURED,
        ((700, Plan(Tile(16, 64, 4, 3), 2)), (4096, Plan(None))),
        ((4096, Plan(tiles(4, 90)[-1], 8)),),  # the scratch cuts its split as M grows
    ],
)
@pytest.mark.parametrize("gpu", [H100, A100, RTX_4090], ids=lambda g: str(g.arch))
def test_what_is_compiled_while_loading_is_all_that_any_m_needs(
    gpu: Gpu, measured: tuple[tuple[int, Plan], ...], kind: str
) -> None:
    for bits, (n, k) in itertools.product((3, 4, 8), ((3584, 3584), (37888, 3584), (40, 96))):
        weight = shape(n, k, bits, measured)
        ready = representatives(weight, gpu, kind)
        every = (*range(1, 140), *range(140, 20000, 61), 512, 513, 700, 701, 4096, 4097)
        assert {plan(m, weight, gpu, kind).variant for m in every} <= set(ready)
        assert all(plan(m, weight, gpu, kind).variant == variant for variant, m in ready.items())


@pytest.mark.parametrize("gpu", [H100, A100, RTX_4090], ids=lambda g: str(g.arch))
def test_plans_worth_a_measurement_can_run_and_can_be_written(gpu: Gpu) -> None:
    for bits, rows in itertools.product((2, 3, 4, 8), (1, 2, 3, 16, 33, 512, 2048)):
        weight = shape(3584, 3584, bits)
        found = options(rows, weight, gpu)
        assert found[0] == plan(rows, weight, gpu)
        assert len(found) == len(set(found)) <= 24
        tiles_named = {t.tile for t in found if t.tile}
        assert tiles_named <= set(known_tiles(bits, gpu.arch))
        assert all(t.split <= weight.slabs and programs_of(rows, weight, t.tile) <= MAX_TILES for t in found if t.tile)
        assert any(t.gemv for t in tiles_named) == (rows <= (1 if bits in (3, 8) else 2))
        assert any(p.tile is None for p in found) == (rows >= 64)


def test_a_table_can_name_each_tile_without_doubt() -> None:
    for bits, arch in itertools.product((2, 3, 4, 8), (75, 80, 89, 90, 120)):
        names = [(t.rows_m, t.rows_n) for t in known_tiles(bits, arch)]
        assert len(set(names)) == len(names)


def test_scratch_is_bounded_by_the_memory_of_the_gpu() -> None:
    assert scratch_bytes(80 << 30) == SCRATCH_MAX
    assert scratch_bytes(8 << 30) == 64 << 20
    assert scratch_bytes((8 << 30) + 12345) == 64 << 20


def test_scratch_is_reserved_once_and_keeps_its_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scratch, "_held", {})
    device = torch.device("cpu")
    alone = scratch.take(device, (4, 8), torch.float32)
    scratch.reserve(device)
    first = scratch.take(device, (4, 8), torch.float32)
    scratch.reserve(device)
    second = scratch.take(device, (2, 3, 5), torch.bfloat16)
    assert first.data_ptr() == second.data_ptr() != alone.data_ptr()
    assert (first.shape, second.shape, second.dtype) == ((4, 8), (2, 3, 5), torch.bfloat16)
    counters = scratch.counters(device)
    assert counters.data_ptr() == scratch.counters(device).data_ptr()
    assert (counters.numel(), int(counters.abs().max())) == (MAX_TILES, 0)
    huge = scratch.take(device, (SCRATCH_MAX + 1,), torch.uint8)
    assert huge.data_ptr() != first.data_ptr()


def test_a_device_that_cannot_be_asked_is_assumed() -> None:
    assert gpu_of(torch.device("cpu")) == ASSUMED


def test_the_log_says_what_serves_at_which_m() -> None:
    wide = shape(37888, 3584, 4)
    assert describe(shape(3584, 18944, 4), H100, AUTO) == "fused to M=512, dequantized in 1 part above"
    assert describe(wide, H100, DENSE) == "dequantized in 2 parts"
    assert describe(wide, H100, FUSED) == "fused"
    assert describe(shape(3584, 18944, 4, MEASURED), H100, AUTO).startswith("as measured to M=64, then fused to M=512")
    assert describe(wide, H100, GEMV).startswith("gemv to M=2, fused")
