"""Which kernel of the Triton family serves which product: pure functions, for GPUs that are not here."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vlmq_serve.kernels import scratch
from vlmq_serve.kernels.bench.layers import LAYERS
from vlmq_serve.kernels.gpu import ASSUMED, Gpu, gpu_of
from vlmq_serve.kernels.plan import (
    AUTO,
    DENSE,
    DENSE_ABOVE,
    FUSED,
    MAX_SPLIT,
    SCRATCH_MAX,
    dense_step,
    describe,
    plan,
    scratch_bytes,
)
from vlmq_serve.kernels.planes import slab_length
from vlmq_serve.kernels.tiles import tiles

pytestmark = pytest.mark.unit

H100 = Gpu(90, 132, 80 << 30)
A100 = Gpu(80, 108, 40 << 30)
RTX_4090 = Gpu(89, 128, 24 << 30)


def slabs(in_features: int, bits: int) -> int:
    return -(-in_features // slab_length(in_features, 128, bits))


@pytest.mark.parametrize("gpu", [H100, A100, RTX_4090], ids=lambda g: str(g.arch))
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_tile_grows_with_rows_and_the_dense_product_takes_over(gpu: Gpu, bits: int) -> None:
    family = tiles(bits, gpu.arch)
    for rows in range(1, DENSE_ABOVE + 2, 7):
        chosen = plan(rows, 3584, 3584, slabs(3584, bits), bits, gpu)
        assert chosen.tile is not None
        smallest = next((t for t in family if t.rows_m >= rows), family[-1])
        assert chosen.tile == smallest
    assert plan(DENSE_ABOVE + 1, 3584, 3584, slabs(3584, bits), bits, gpu).tile is None
    assert plan(16384, 3584, 3584, slabs(3584, bits), bits, gpu).tile is None


def test_narrow_layers_are_split_along_k_and_wide_ones_are_not() -> None:
    """qkv of the 7B has 36 tiles of N for 132 processors, gate_up 296; a K of 7 slabs takes 4 parts at most."""
    assert plan(1, 4608, 3584, slabs(3584, 2), 2, H100).split == 4
    assert plan(1, 3584, 18944, slabs(18944, 4), 4, H100).split == 8
    assert plan(1, 37888, 3584, slabs(3584, 4), 4, H100).split == 1
    assert plan(512, 3584, 3584, slabs(3584, 4), 4, H100).split == 1


@given(
    rows=st.integers(1, 16384),
    out_features=st.integers(1, 1 << 17),
    in_features=st.integers(1, 1 << 10).map(lambda n: 32 * n),
    bits=st.sampled_from([2, 3, 4]),
    gpu=st.sampled_from([H100, A100, RTX_4090, Gpu(75, 16, 4 << 30), Gpu(120, 170, 32 << 30)]),
)
def test_every_product_has_a_plan_within_bounds(
    rows: int, out_features: int, in_features: int, bits: int, gpu: Gpu
) -> None:
    count = slabs(in_features, bits)
    chosen = plan(rows, out_features, in_features, count, bits, gpu)
    room = scratch_bytes(gpu.memory)
    if chosen.tile is None:
        assert rows > DENSE_ABOVE
        assert 0 < chosen.step <= max(out_features, 128)
        assert 2 * chosen.step * in_features <= max(room, 2 * 128 * in_features)
        return
    assert rows <= DENSE_ABOVE
    assert chosen.split in (1, 2, 4, 8)
    assert chosen.split <= min(count, MAX_SPLIT)
    if chosen.split > 1:
        assert 4 * chosen.split * rows * out_features <= room


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
    assert plan(4096, 3584, 3584, 14, 4, H100, FUSED).tile is not None
    assert plan(1, 3584, 3584, 14, 4, H100, DENSE).tile is None


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
    huge = scratch.take(device, (SCRATCH_MAX + 1,), torch.uint8)
    assert huge.data_ptr() != first.data_ptr()


def test_a_device_that_cannot_be_asked_is_assumed() -> None:
    assert gpu_of(torch.device("cpu")) == ASSUMED


def test_the_log_says_what_serves_at_which_m() -> None:
    assert describe(3584, 18944, H100, AUTO) == "fused to M=512, dequantized in 1 part above"
    assert describe(37888, 3584, H100, DENSE) == "dequantized in 2 parts"
    assert describe(37888, 3584, H100, FUSED) == "fused"
