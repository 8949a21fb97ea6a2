"""The custom operator: schema, fake implementation, torch.compile, and what importing the package does not do."""

import subprocess
import sys

import pytest
import torch

from vlmq_serve.format.scheme import Scheme
from vlmq_serve.format.weight import PackedWeight
from vlmq_serve.kernels import PreparedWeight, ensure_registered, gemm, linear, prepare

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


@pytest.mark.parametrize("path", ["reference", "cpu_dequant", None])
@pytest.mark.parametrize("shape", [(5, 128), (2, 3, 128), (0, 128)])
def test_opcheck(path: str | None, shape: tuple[int, ...]) -> None:
    prepared = small(path=path)
    x = torch.randn(shape).bfloat16()
    torch.library.opcheck(torch.ops.vlmq.gemm.default, arguments(x, prepared))


def test_registration_is_idempotent() -> None:
    ensure_registered()
    before = torch.ops.vlmq.gemm.default
    ensure_registered()
    assert torch.ops.vlmq.gemm.default is before


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
        "assert not hasattr(torch.ops.vlmq, 'gemm'), 'operator registered'\n"
        "assert 'vllm' not in sys.modules and 'transformers' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
