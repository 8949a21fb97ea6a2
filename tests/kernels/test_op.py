"""The custom operator: schema, fake implementation, torch.compile, and what importing the package does not do."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from vlmq_serve.format.scheme import Scheme
from vlmq_serve.format.weight import PackedWeight
from vlmq_serve.kernels import (
    PreparedWeight,
    choice,
    ensure_registered,
    gemm,
    integer,
    linear,
    native,
    native_op,
    op,
    prepare,
)

pytestmark = pytest.mark.unit


def small(dtype: torch.dtype = torch.bfloat16, path: str | None = None) -> PreparedWeight:
    scheme = Scheme(3, 64)
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 8, (96, 128), generator=generator)
    zeros = torch.randint(0, 8, (96, 2), generator=generator)
    weight = PackedWeight.from_codes(codes, (torch.rand(96, 2, generator=generator) + 0.1).to(dtype), zeros, scheme)
    return prepare(weight, dtype, "cpu", path)


def arguments(x: torch.Tensor, w: PreparedWeight) -> tuple[object, ...]:
    return (x, w.qdata, w.scales, w.zeros, w.bits, w.group_size, w.out_features, w.path)


def integer_arguments(x: torch.Tensor, w: PreparedWeight) -> tuple[object, ...]:
    return (x, w.qdata, w.scales, w.zeros, w.bits, w.out_features, choice.ACTIVATION_BITS[w.path])


SHAPES = [(5, 128), (2, 3, 128), (128,), (0, 128)]
compiled = pytest.mark.skipif(native.library() is None, reason="no C++ compiler, or a CPU without AVX2")


@pytest.mark.parametrize("path", ["reference", "cpu_dequant"])
@pytest.mark.parametrize("shape", SHAPES)
def test_opcheck(path: str, shape: tuple[int, ...]) -> None:
    prepared = small(path=path)
    x = torch.randn(shape).bfloat16()
    torch.library.opcheck(torch.ops.vlmq.gemm.default, arguments(x, prepared))


@compiled
@pytest.mark.parametrize("path", ["cpu_int16", "cpu_int8"])
@pytest.mark.parametrize("shape", SHAPES)
def test_opcheck_of_integer_products(path: str, shape: tuple[int, ...]) -> None:
    prepared = small(path=path)
    x = torch.randn(shape).bfloat16()
    torch.library.opcheck(torch.ops.vlmq.gemm_integer.default, integer_arguments(x, prepared))


@compiled
@pytest.mark.parametrize("x_bits", [16, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_operator_in_cpp_does_what_the_one_in_python_does(dtype: torch.dtype, x_bits: int) -> None:
    """Slices, rows beyond one pass, several dimensions, none at all."""
    assert native_op.register(integer.dense_rows()), "the C++ operator did not compile"
    prepared = small(dtype, path="cpu_int16")
    rows = native.library().vlmq_max_rows() + 3  # type: ignore[union-attr]
    wide = torch.randn(rows, 200).to(dtype)
    for x in (
        wide[:, 8:136], wide[::2, :128], wide.t()[:200].t()[:5, :128], wide[:, 40:168].t().contiguous().t(),
        wide[:6, :128].reshape(2, 3, 128), wide[0, :128], wide[:0, :128], wide[:0, :128].reshape(0, 2, 128),
    ):  # fmt: skip
        given = (x, prepared.qdata, prepared.scales, prepared.zeros, prepared.bits, prepared.out_features, x_bits)
        got, expected = torch.ops.vlmq.gemm_integer(*given), op._gemm_integer(*given)
        assert torch.equal(got, expected)
        assert (got.dtype, got.shape, got.stride()) == (expected.dtype, expected.shape, expected.stride())


def strided(t: torch.Tensor) -> torch.Tensor:
    """The same values, not contiguous."""
    return t.transpose(0, 1).contiguous().transpose(0, 1)


@compiled
@pytest.mark.parametrize("operator", ["C++", "Python"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 64)}, "x with K=64 for a weight with K=128"),
        ({"x": torch.zeros(2, 256)}, "x with K=256 for a weight with K=128"),
        ({"x": torch.zeros(2, 0)}, "x with K=0"),
        ({"x": torch.tensor(1.0)}, "another layout"),
        ({"x": torch.zeros(1, 128, dtype=torch.float64)}, "float32, bfloat16 and float16"),
        ({"bits": 4}, "for a weight with K=96"),
        ({"bits": 5}, "got 5 bits"),
        ({"x_bits": 4}, "got 4 bits of x"),
        ({"out_features": 97}, "another layout"),
        ({"qdata": torch.zeros(6, 12, 16, dtype=torch.int32)}, "another layout"),
        ({"qdata": torch.zeros(3, 12, 32)}, "another layout"),
        ({"qdata": torch.zeros(96, 12, dtype=torch.int32)}, "another layout"),
        ({"qdata": strided(torch.zeros(3, 12, 32, dtype=torch.int32))}, "not contiguous"),
        ({"scales": torch.ones(3, 0, 32)}, "another layout"),
        ({"scales": torch.ones(3, 8, 32)}, "another layout"),
        ({"scales": torch.ones(2, 2, 32)}, "another layout"),
        ({"scales": torch.ones(3, 2, 32, dtype=torch.float64)}, "float32, bfloat16 and float16"),
        ({"scales": strided(torch.ones(3, 2, 32))}, "not contiguous"),
        ({"zeros": torch.ones(3, 1, 32, dtype=torch.uint8)}, "another layout"),
        ({"zeros": torch.ones(3, 2, 32, dtype=torch.int64)}, "another layout"),
        ({"zeros": strided(torch.ones(3, 2, 32, dtype=torch.uint8))}, "not contiguous"),
    ],
)
def test_integer_products_refuse_what_is_no_weight_for_x(
    operator: str, change: dict[str, object], message: str
) -> None:
    """It would be read past its end, or taken for other numbers."""
    prepared = small(torch.float32, path="cpu_int16")
    names = ("x", "qdata", "scales", "zeros", "bits", "out_features", "x_bits")
    given = dict(zip(names, integer_arguments(torch.zeros(2, 128), prepared), strict=True))
    product: Any = torch.ops.vlmq.gemm_integer if operator == "C++" else op._gemm_integer
    product(*given.values())
    with pytest.raises(RuntimeError, match=message):
        product(*(given | change).values())


@pytest.mark.parametrize("path", ["reference", "cpu_dequant", pytest.param("cpu_int16", marks=compiled)])
@pytest.mark.parametrize("field", ["qdata", "scales", "zeros"])
def test_a_weight_without_data_gives_no_numbers(path: str, field: str) -> None:
    """The fake implementation, which the dispatcher asks for it, would return memory as it is."""
    prepared = small(path=path)
    empty = replace(prepared, **{field: getattr(prepared, field).to("meta")})
    with pytest.raises(RuntimeError, match="got x on cpu, the weight on meta; move one"):
        linear(torch.ones(1, 128).bfloat16(), empty)


@compiled
def test_operator_in_cpp_on_several_threads() -> None:
    """Each has memory of its own for x."""
    prepared = small(torch.float32, path="cpu_int16")
    inputs = [torch.randn(rows, 128) for rows in (1, 300, 7, 40)]
    expected = [linear(x, prepared) for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        got = [*pool.map(lambda turn: linear(inputs[turn % 4], prepared), range(400))]
    assert all(torch.equal(y, expected[turn % 4]) for turn, y in enumerate(got))


@compiled
def test_under_inductor() -> None:
    """As vLLM compiles: the operator is called by generated code, with a weight and between other operators."""
    prepared = small(path="cpu_int16")
    bias = torch.randn(96).bfloat16()

    def layer(x: torch.Tensor) -> torch.Tensor:
        return torch.relu(linear(x * 2, prepared, bias))

    generated = torch.compile(layer, fullgraph=True, dynamic=True)
    for count in (1, 5, 70):
        x = torch.randn(count, 128).bfloat16()
        torch.testing.assert_close(generated(x), layer(x), rtol=1e-2, atol=1e-2)


@compiled
def test_a_filled_cache_serves_users_who_cannot_write(tmp_path: Path) -> None:
    """The line of docs/serving.md for container images: what a process looks for later is all there."""
    environment = {**os.environ, "VLMQ_CACHE": str(tmp_path)}
    fill = "from vlmq_serve.kernels.native_op import compile_all; compile_all()"
    use = "from tests.kernels.test_op import linear, small, torch; linear(torch.ones(1, 128).bfloat16(), small())"
    for code in (fill, use):
        before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False
        )
        assert done.returncode == 0, done.stderr
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before
    assert sum(path.name.startswith("operator") for path in before) == 1


@compiled
def test_a_cache_that_cannot_be_filled_is_an_error() -> None:
    """Else an image would be built without a word and without kernels."""
    code = (
        "from vlmq_serve.kernels import native, native_op\n"
        "native.supported_isas = lambda: ('avx2',)\n"
        "native_op.compile_all()\n"
    )
    environment = {**os.environ, "VLMQ_CACHE": "/proc/nowhere"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 1
    assert "avx2, operator could not be kept in /proc/nowhere" in done.stderr


@compiled
def test_operator_in_cpp_leaves_many_rows_to_the_dense_product() -> None:
    """As it does on a CPU with AMX."""
    prepared = small(path="cpu_int16")
    x = torch.randn(2, 5, 128).bfloat16()
    given = (x, prepared.qdata, prepared.scales, prepared.zeros, prepared.bits, prepared.out_features)
    assert native_op.register(10)
    try:
        assert torch.equal(torch.ops.vlmq.gemm_integer(*given, 16), torch.ops.vlmq.gemm_dense(*given))
        fewer = x[:, :4]
        assert torch.equal(torch.ops.vlmq.gemm_integer(fewer, *given[1:], 16), op._gemm_integer(fewer, *given[1:], 16))
    finally:
        native_op.register.cache_clear()
        assert native_op.register(integer.dense_rows())


@compiled
def test_without_the_operator_in_cpp() -> None:
    """Where torch's headers are missing the same kernels serve, called through Python."""
    code = (
        "import torch, logging; logging.basicConfig(level=logging.INFO)\n"
        "from tests.kernels.test_op import small\n"
        "from vlmq_serve.kernels import linear, native_op\n"
        "native_op.Path = lambda _: __import__('pathlib').Path('/nowhere/torch')\n"
        "torch.manual_seed(0); x = torch.randn(3, 128).bfloat16()\n"
        "assert torch.equal(linear(x, small(path='cpu_int16'))[:2], linear(x[:2], small(path='cpu_int16')))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "called through Python" in done.stderr


def test_registration_is_idempotent() -> None:
    ensure_registered()
    before = torch.ops.vlmq.gemm.default
    ensure_registered()
    assert torch.ops.vlmq.gemm.default is before


def test_gemm_where_nothing_was_prepared() -> None:
    """As in a process that was sent a prepared weight."""
    code = (
        "import torch\n"
        "from vlmq_serve.kernels import ensure_integer, gemm\n"
        "ensure_integer()\n"
        "y = gemm(torch.ones(1, 32), torch.zeros(1, 8, 32, dtype=torch.int32), torch.ones(1, 1, 32),\n"
        "         torch.ones(1, 1, 32, dtype=torch.uint8), 8, 32, 5, 'cpu_int16')\n"
        "assert torch.equal(y, torch.full((1, 5), -32.0))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert native.library() is None or done.returncode == 0, done.stderr


def test_gemm_equals_linear() -> None:
    prepared = small()
    x = torch.randn(4, 128).bfloat16()
    assert torch.equal(gemm(*arguments(x, prepared)), linear(x, prepared))  # type: ignore[arg-type]


def test_compiles_in_one_graph_for_any_number_of_rows() -> None:
    """One graph serves every M: the operator is opaque and its fake implementation right for a symbolic M."""
    prepared = small()
    bias = torch.randn(96).bfloat16()
    graphs = []

    def backend(graph: torch.fx.GraphModule, _inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    compiled = torch.compile(lambda x: torch.relu(linear(x, prepared, bias)), fullgraph=True, backend=backend)
    for count in (5, 9, 33, 70):
        x = torch.randn(count, 128).bfloat16()
        torch._dynamo.maybe_mark_dynamic(x, 0)
        assert torch.equal(compiled(x), torch.relu(linear(x, prepared, bias)))
    assert len(graphs) == 1
    assert sum("vlmq" in str(node.target) for node in graphs[0].graph.nodes) == 1


def test_module_holding_the_tensors_compiles() -> None:
    """As a serving engine holds them: parameters on the layer, plain values beside."""

    class Layer(torch.nn.Module):
        def __init__(self, w: PreparedWeight) -> None:
            super().__init__()
            for name in ("qdata", "scales", "zeros"):
                setattr(self, name, torch.nn.Parameter(getattr(w, name), requires_grad=False))
            self.rest = (w.bits, w.group_size, w.out_features, w.in_features, w.path)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return linear(x, PreparedWeight(self.qdata, self.scales, self.zeros, *self.rest))

    layer = Layer(small())
    x = torch.randn(3, 128).bfloat16()
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), layer(x))


def test_import_has_no_side_effects() -> None:
    code = (
        "import sys, torch, vlmq_serve.kernels\n"
        "assert 'triton' not in sys.modules, 'triton imported'\n"
        "assert not torch.cuda.is_initialized()\n"
        "for name in ('gemm', 'gemm_integer', 'gemm_dense'):\n"
        "    assert not hasattr(torch.ops.vlmq, name), 'operator registered'\n"
        "assert 'vllm' not in sys.modules and 'transformers' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
