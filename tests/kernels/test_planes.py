"""The Triton kernel's weight layout: exact round trips, exact size, contiguous planes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.weights import random_weight
from vlmq_serve.format.scheme import Scheme
from vlmq_serve.format.weight import PackedWeight
from vlmq_serve.kernels import planes

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_fields_cover_every_bit_of_every_word_once(bits: int) -> None:
    taken = []
    for word, plane, shift, source, mask in planes.bit_fields(bits):
        assert 0 <= plane < planes.PLANES[bits]
        assert mask << source < 2**bits
        taken += [(word, shift + i) for i in range(mask.bit_length())]
    assert sorted(taken) == [(w, b) for w in range(planes.WORDS[bits]) for b in range(16)]


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_every_word_round_trips(bits: int) -> None:
    """All 65,536 words: unpack, pack, same word."""
    words = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).reshape(1, 1, 2**11, 32)
    codes = planes.unpack_planes(words, bits)
    assert torch.equal(planes.pack_planes(codes, bits, 32 * planes.PLANES[bits]), words)


def test_every_w3_word_round_trips_in_each_place() -> None:
    """All 65,536 values of each of the three words, the other two random."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).reshape(1, 1, 2**11, 32)
    for place in range(3):
        words = torch.randint(-(2**15), 2**15, (1, 3, 2**11, 32)).to(torch.int16)
        words[:, place : place + 1] = every
        assert torch.equal(planes.pack_planes(planes.unpack_planes(words, 3), 3, 512), words)


@settings(max_examples=40, deadline=None)
@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    rows=st.integers(1, 9),
    slabs=st.integers(1, 3),
    choice=st.integers(0, 2),
    seed=st.integers(0, 2**20),
)
def test_codes_round_trip_at_exact_size(bits: int, rows: int, slabs: int, choice: int, seed: int) -> None:
    slab = planes.SLABS[bits][min(choice, len(planes.SLABS[bits]) - 1)]
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (rows, slabs * slab), generator=generator).to(torch.uint8)
    words = planes.pack_planes(codes, bits, slab)
    assert words.shape == (slabs, planes.WORDS[bits], rows, slab // planes.PLANES[bits])
    assert words.numel() * 16 == codes.numel() * bits
    assert torch.equal(planes.unpack_planes(words, bits), codes)


def test_plane_is_a_contiguous_range_of_k() -> None:
    """Code p of word j of a slab is K index slab*KB + p*KW + j: what the kernel's addresses rely on."""
    codes = torch.zeros(2, 1024, dtype=torch.uint8)
    codes[1, 512 + 3 * 64 + 5] = 3
    words = planes.pack_planes(codes, 2, 512)
    assert words[1, 0, 1, 5] == 3 << (2 * 3)
    assert int(words.count_nonzero()) == 1


@pytest.mark.parametrize(
    ("cols", "group", "bits", "expected"),
    [
        (3584, 128, 4, 256), (3584, 128, 2, 512), (3584, 128, 3, 512),
        (8960, 128, 2, 256), (8960, 128, 3, 256), (8960, 64, 4, 256),
        (18944 // 4, 128, 4, 128), (18944 // 4, 128, 2, 128), (1536, 32, 4, 128), (1536, 32, 2, 256),
        (96, 32, 2, 128), (96, 32, 3, 256), (96, -1, 4, 64),
        (3584, 128, 8, 128), (1280, 64, 8, 128), (5120, 64, 8, 128), (1536, 32, 8, 64), (3424, 32, 8, 64),
        (3420, -1, 8, 64),
    ],
)  # fmt: skip
def test_slab_length(cols: int, group: int, bits: int, expected: int) -> None:
    length = Scheme(bits, group).group_length(cols)
    slab = planes.slab_length(cols, length, bits)
    assert slab == expected
    width = slab // planes.PLANES[bits]
    assert width >= 16
    assert length % width == 0 or length == cols


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("cols", [96, 512, 1280])
@pytest.mark.parametrize("symmetric", [False, True])
def test_prepare_pads_with_weights_of_zero(bits: int, cols: int, symmetric: bool) -> None:
    scheme = Scheme(bits, 32, symmetric)
    groups = cols // 32
    codes = torch.randint(0, 2**bits, (24, cols))
    zeros = None if symmetric else torch.randint(0, 2**bits, (24, groups))
    weight = PackedWeight.from_codes(codes, (torch.rand(24, groups) + 0.1).to(torch.float16), zeros, scheme)
    words, groups_of = planes.prepare_planes(weight, torch.float16)
    restored = planes.unpack_planes(words, bits)
    padded = restored.shape[1]
    assert groups_of.shape == (padded // 32, 24, 2)
    scales, zero = groups_of.unbind(-1)
    dense = (restored.float() - zero.float().t().repeat_interleave(32, 1)) * scales.float().t().repeat_interleave(32, 1)
    assert torch.equal(dense[:, :cols], weight.dequantize())
    assert not dense[:, cols:].any()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("cols", "ranks"), [(18944, 2), (18944, 4), (8960, 2), (3584, 4), (1536, 8)])
def test_row_parallel_shards_hold_their_range_of_k(bits: int, cols: int, ranks: int) -> None:
    """A rank packs its own columns: slabs as its K demands, its codes, scales and zeros, and no bit more."""
    scheme = Scheme(bits, 64)
    groups = cols // 64
    codes = torch.randint(0, 2**bits, (5, cols), dtype=torch.uint8)
    scales, zeros = torch.rand(5, groups) + 0.1, torch.randint(0, 2**bits, (5, groups))
    share, per = cols // ranks, groups // ranks
    for rank in range(ranks):
        part = codes[:, rank * share : (rank + 1) * share]
        own = slice(rank * per, (rank + 1) * per)
        weight = PackedWeight.from_codes(part.int(), scales[:, own].bfloat16(), zeros[:, own], scheme)
        words, both = planes.prepare_planes(weight, torch.bfloat16)
        assert torch.equal(planes.unpack_planes(words, bits)[:, :share], part)
        assert torch.equal(both[:per, :, 0].t(), scales[:, own].bfloat16())
        assert torch.equal(both[:per, :, 1].t().int(), zeros[:, own].int())
        exact = share % planes.SLABS[bits][-1] == 0
        assert words.numel() * 16 == 5 * bits * share if exact else words.numel() * 16 < 5 * bits * (share + 256)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_shards_at_slab_boundaries_are_slices(bits: int) -> None:
    """Of the whole weight's words: ranges of slabs for row-parallel layers, ranges of rows for column-parallel ones."""
    codes = torch.randint(0, 2**bits, (24, 4096), dtype=torch.uint8)
    slab = planes.slab_length(4096, 128, bits)
    words = planes.pack_planes(codes, bits, slab)
    half = words.shape[0] // 2
    assert torch.equal(planes.pack_planes(codes[:, 2048:], bits, slab), words[half:])
    assert torch.equal(planes.pack_planes(codes[7:19], bits, slab), words[:, :, 7:19])


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_second_half_of_a_slab_looks_like_the_first_after_a_shift(bits: int) -> None:
    """What a kernel that takes half slabs relies on: W3 in word h and byte h of word 2, the others in byte h."""
    slab = planes.SLABS[bits][0]
    codes = torch.randint(0, 2**bits, (3, slab), dtype=torch.uint8)
    swapped = torch.cat((codes[:, slab // 2 :], codes[:, : slab // 2]), 1)
    words, other = (planes.pack_planes(c, bits, slab).int() & 0xFFFF for c in (codes, swapped))
    low, high = other & 0xFF, words >> 8
    if bits == 3:
        assert torch.equal(other[:, 0], words[:, 1])
        assert torch.equal(low[:, 2], high[:, 2])
    else:
        assert torch.equal(low, high)


def test_rows_are_repacked_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A head has half a billion codes; in parts they give the words that they give at once."""
    weight = random_weight(70, 320, 3, 32, False)
    whole, _ = planes.prepare_planes(weight, torch.bfloat16)
    monkeypatch.setattr(planes, "CODES_AT_ONCE", 16 * 320)
    parts, _ = planes.prepare_planes(weight, torch.bfloat16)
    assert torch.equal(parts, whole)
    assert torch.equal(planes.unpack_planes(parts, 3)[:, :320], weight.codes())
