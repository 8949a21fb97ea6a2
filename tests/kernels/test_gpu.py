"""The Triton family on a real GPU: what the interpreter cannot show. Skipped without one."""

import pytest
import torch

from vlmq_serve.format.scheme import Scheme
from vlmq_serve.format.weight import PackedWeight
from vlmq_serve.kernels import PreparedWeight, linear, prepare
from vlmq_serve.kernels.bench.layers import Layer, random_weight

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")]

CUDA = torch.device("cuda")
ROWS = (1, 8, 9, 33, 130, 512, 513, 4096)


def prepared_and_packed(bits: int, dtype: torch.dtype, path: str = "triton") -> tuple[PreparedWeight, PackedWeight]:
    packed = random_weight(Layer("test", "odd", 1000, 1536), Scheme(bits, 128), dtype, CUDA)
    return prepare(packed, dtype, CUDA, path), packed


@pytest.mark.parametrize("path", ["triton", "triton_fused", "triton_dense"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_no_further_from_float64_than_the_dense_product(bits: int, dtype: torch.dtype, path: str) -> None:
    prepared, packed = prepared_and_packed(bits, dtype, path)
    exact = packed.dequantize().double()
    for count in ROWS:
        x = torch.randn(count, exact.shape[1], device=CUDA, generator=torch.Generator(CUDA).manual_seed(count))
        x = x.to(dtype)
        expected = x.double() @ exact.T
        error = float((linear(x, prepared).double() - expected).norm() / expected.norm())
        plain = torch.nn.functional.linear(x, exact.to(dtype)).double()
        assert error <= 1.1 * float((plain - expected).norm() / expected.norm()), count


@pytest.mark.parametrize("count", ROWS)
def test_captured_graphs_give_the_same_bits(count: int) -> None:
    """Also after other layers have used the scratch between capture and replay."""
    prepared, _ = prepared_and_packed(3, torch.bfloat16)
    other, _ = prepared_and_packed(4, torch.bfloat16)
    x = torch.randn(count, 1536, device=CUDA).bfloat16()
    expected = linear(x, prepared)
    assert torch.equal(linear(x, prepared), expected)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = linear(x, prepared)
    linear(x, other)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(y, expected)
