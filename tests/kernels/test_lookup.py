"""Rows of packed embeddings against the dequantized table."""

import pytest
import torch

from tests.kernels.weights import random_weight
from vlmq_serve.format.scheme import ALLOWED_BITS
from vlmq_serve.format.weight import PackedWeight
from vlmq_serve.kernels.lookup import ROWS_AT_ONCE, lookup

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(("group", "symmetric"), [(32, False), (64, True), (-1, False)])
@pytest.mark.parametrize("bits", ALLOWED_BITS)
def test_rows_are_those_of_the_dequantized_table(bits: int, group: int, symmetric: bool) -> None:
    weight = random_weight(50, 192, bits, group, symmetric)
    many = torch.randint(0, 50, (ROWS_AT_ONCE + 1,))
    for ids in (torch.randint(0, 50, (3, 7)), torch.tensor([49, 0, 0]), torch.empty(0, dtype=torch.int64), many):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            got = lookup(ids, weight.qweight, weight.scales, weight.zeros, bits, dtype)
            assert got.dtype == dtype
            assert torch.equal(got, weight.dequantize(dtype)[ids])


def test_every_code_in_every_place() -> None:
    """Words of all ones and of single bits: a sign that is shifted in, or a bit of the neighbour, would show."""
    weight = random_weight(33, 32, 3, 32, True)
    words = torch.cat(
        [torch.full((1, 3), -1, dtype=torch.int32), (1 << torch.arange(32)).to(torch.int32)[:, None].expand(-1, 3)]
    )
    weight = PackedWeight(words, torch.ones_like(weight.scales), None, weight.scheme)
    got = lookup(torch.arange(33), weight.qweight, weight.scales, None, 3, torch.float32)
    assert torch.equal(got + 4, weight.codes().float())
