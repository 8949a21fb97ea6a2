"""The Triton family on a real GPU: what the interpreter cannot show. Skipped without one.

`python -m benchmarks.kernels.first_gpu` runs one process per width, by the w2, w3, w4 and w8 in the names.
"""

import pytest
import torch

from vlmq_serve.format.scheme import Scheme
from vlmq_serve.format.weight import PackedWeight
from vlmq_serve.kernels import PreparedWeight, linear, prepare
from vlmq_serve.kernels.bench.layers import Layer, random_weight

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")]

CUDA = torch.device("cuda")
ROWS = (1, 2, 8, 9, 33, 130, 512, 513, 4096)
PATHS = ("triton", "triton_second_launch", "triton_gemv", "triton_dense", "triton_fused")
REPEATS = 200
"""Products that must be equal: programs arrive in another order every time."""
WIDTHS = pytest.mark.parametrize("bits", [4, 3, 2, 8], ids=lambda bits: f"w{bits}")


def prepared_and_packed(
    bits: int, dtype: torch.dtype, path: str = "triton", rows: int = 1000, cols: int = 1536
) -> tuple[PreparedWeight, PackedWeight]:
    packed = random_weight(Layer("test", "odd", rows, cols), Scheme(bits, 128), dtype, CUDA)
    return prepare(packed, dtype, CUDA, path), packed


def some(count: int, cols: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(count, cols, device=CUDA, generator=torch.Generator(CUDA).manual_seed(count)).to(dtype)


@WIDTHS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("path", PATHS)
def test_no_further_from_float64_than_the_dense_product(bits: int, dtype: torch.dtype, path: str) -> None:
    prepared, packed = prepared_and_packed(bits, dtype, path)
    exact = packed.dequantize().double()
    for count in ROWS:
        x = some(count, exact.shape[1], dtype)
        expected = x.double() @ exact.T
        error = float((linear(x, prepared).double() - expected).norm() / expected.norm())
        plain = torch.nn.functional.linear(x, exact.to(dtype)).double()
        assert error <= 1.1 * float((plain - expected).norm() / expected.norm()), count


@WIDTHS
@pytest.mark.parametrize("count", [1, 9, 40, 130])
def test_the_last_program_adds_what_a_second_launch_adds(bits: int, count: int) -> None:
    """Many times, with other layers and other splits between them: a race would show as another sum."""
    layers = [prepared_and_packed(bits, torch.bfloat16, "triton", *shape)[0] for shape in ((1000, 18944), (200, 4096))]
    two, _ = prepared_and_packed(bits, torch.bfloat16, "triton_second_launch", 1000, 18944)
    x, narrow = some(count, 18944, torch.bfloat16), some(3, 4096, torch.bfloat16)
    expected = linear(x, two)
    for _ in range(REPEATS):
        y = linear(x, layers[0])
        linear(narrow, layers[1])
        assert torch.equal(y, expected)


@WIDTHS
@pytest.mark.parametrize("count", ROWS)
def test_captured_graphs_give_the_same_bits(bits: int, count: int) -> None:
    """Also after other layers have used the scratch between capture and replay."""
    prepared, _ = prepared_and_packed(bits, torch.bfloat16)
    other, _ = prepared_and_packed(2 if bits == 4 else 4, torch.bfloat16)
    x = some(count, 1536, torch.bfloat16)
    expected = linear(x, prepared)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = linear(x, prepared)
    for _ in range(3):
        linear(x, other)
        y.zero_()
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(y, expected)


@WIDTHS
def test_a_graph_can_be_captured_before_any_product(bits: int) -> None:
    """All kernels are compiled by then, as a compilation inside a capture would end it."""
    prepared, _ = prepared_and_packed(bits, torch.float16, "triton", 1008, 2048)
    for count in ROWS:
        x = some(count, 2048, torch.float16)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = linear(x, prepared)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(y, linear(x, prepared))
