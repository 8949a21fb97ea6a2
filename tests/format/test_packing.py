"""Packing: round trips, the bit stream as a definition, and committed golden vectors."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmq_serve.format.errors import VLMQError
from vlmq_serve.format.packing import pack_codes, unpack_codes

GOLDEN = json.loads((Path(__file__).parent / "golden_packing.json").read_text())


def bit_stream_words(row: list[int], bits: int) -> list[int]:
    """The definition, with Python integers: code i at the bits [i*bits, (i+1)*bits) of one long number."""
    number = sum(code << (index * bits) for index, code in enumerate(row))
    words = [(number >> (32 * w)) & 0xFFFFFFFF for w in range(len(row) * bits // 32)]
    return [word - 2**32 if word >= 2**31 else word for word in words]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_round_trip_and_definition(bits: int, data: st.DataObject) -> None:
    rows = data.draw(st.integers(0, 4))
    blocks = data.draw(st.integers(1, 4))
    seed = data.draw(st.integers(0, 2**31))
    codes = torch.randint(0, 2**bits, (rows, 32 * blocks), generator=torch.Generator().manual_seed(seed))
    packed = pack_codes(codes, bits)
    assert packed.dtype == torch.int32
    assert packed.shape == (rows, blocks * bits)
    assert torch.equal(unpack_codes(packed, bits).long(), codes)
    for row, words in zip(codes.tolist(), packed.tolist(), strict=True):
        assert words == bit_stream_words(row, bits)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_golden_vectors(bits: int) -> None:
    case = GOLDEN[str(bits)]
    assert pack_codes(torch.tensor(case["codes"]), bits).tolist() == case["words"]
    assert unpack_codes(torch.tensor(case["words"], dtype=torch.int32), bits).tolist() == case["codes"]


@pytest.mark.parametrize("bits", [2, 4])
def test_words_equal_compressed_tensors(bits: int) -> None:
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers", exc_type=ImportError)
    codes = torch.randint(0, 2**bits, (8, 128), generator=torch.Generator().manual_seed(bits))
    signed = (codes - 2 ** (bits - 1)).to(torch.int8)
    assert torch.equal(helpers.pack_to_int32(signed, bits), pack_codes(codes, bits))


@pytest.mark.parametrize(
    ("codes", "bits", "message"),
    [
        (torch.zeros(2, 33, dtype=torch.int64), 4, "multiple of 32"),
        (torch.full((1, 32), 4), 2, r"allowed \[0, 3\]"),
        (torch.full((1, 32), -1), 3, r"allowed \[0, 7\]"),
        (torch.zeros(1, 32, dtype=torch.int64), 5, "bits: got 5"),
    ],
)
def test_bad_codes(codes: torch.Tensor, bits: int, message: str) -> None:
    with pytest.raises(VLMQError, match=message):
        pack_codes(codes, bits)


def test_bad_words() -> None:
    with pytest.raises(VLMQError, match="multiple of 3"):
        unpack_codes(torch.zeros(1, 4, dtype=torch.int32), 3)
