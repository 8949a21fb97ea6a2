"""What is compiled while a model loads, held against what Triton would compile in a request. Needs no GPU.

Triton compiles a kernel again for every combination of compile-time arguments, of the types of the others, and of facts
about them: a whole number that is 1 or divides by 16, a pointer that does. Here its own code works out that key for a
Hopper GPU while our launches run on the CPU, where they go no further.
"""

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime import jit

from vlmq_serve.format.scheme import Scheme
from vlmq_serve.kernels import triton_path
from vlmq_serve.kernels.bench.layers import Layer, random_weight
from vlmq_serve.kernels.gpu import Gpu
from vlmq_serve.kernels.plan import AUTO, FUSED, GEMV, SECOND_LAUNCH
from vlmq_serve.kernels.planes import prepare_planes

pytestmark = pytest.mark.unit

HOPPER = Gpu(90, 132, 8 << 30)
MANY_ROWS = (*range(1, 20), 31, 32, 33, 48, 64, 65, 100, 128, 129, 144, 256, 500, 512, 513, 528, 1000, 1024)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Keys of what the launches so far would have compiled."""
    backend = make_backend(GPUTarget("cuda", 90, 32))
    keys: set[str] = set()

    def note(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        assert len(grid) in (2, 3)
        bind = jit.create_function_from_signature(kernel.signature, kernel.params, backend)
        _, specialization, rest = bind(*args, **options)
        keys.add(f"{kernel.__name__} {specialization} {rest}")

    monkeypatch.setattr(jit.JITFunction, "run", note)
    monkeypatch.setattr(triton_path, "gpu_of", lambda _: HOPPER)
    monkeypatch.setattr(triton_path, "_warm", set())
    return keys


def operand(bits: int, out_features: int, in_features: int, group: int = 32) -> triton_path.Operand:
    weight = random_weight(Layer("test", "any", out_features, in_features), Scheme(bits, group), torch.bfloat16, CPU)
    return triton_path.Operand(*prepare_planes(weight, torch.bfloat16), bits, group, out_features, in_features)


CPU = torch.device("cpu")


@pytest.mark.parametrize("kind", [AUTO, FUSED, GEMV, SECOND_LAUNCH])
@pytest.mark.parametrize(
    ("bits", "out_features", "in_features"), [(4, 272, 1024), (3, 40, 1056), (2, 1, 512), (8, 48, 1056)]
)
def test_a_request_compiles_nothing(
    bits: int, out_features: int, in_features: int, kind: str, compiled: set[str]
) -> None:
    """Whatever its M, and also where x is a view that begins at an odd address."""
    weight = operand(bits, out_features, in_features)
    triton_path.warm_up(weight, kind)
    ready = set(compiled)
    assert len(ready) >= 5
    for rows in MANY_ROWS:
        triton_path.gemm(torch.zeros(rows, in_features, dtype=torch.bfloat16), weight, kind)
    shifted = torch.zeros(3 * in_features + 1, dtype=torch.bfloat16)[1:].view(3, in_features)
    assert shifted.data_ptr() % 16
    triton_path.gemm(shifted, weight, kind)
    assert compiled == ready


def test_layers_of_one_kind_are_compiled_once(compiled: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    triton_path.warm_up(operand(4, 272, 1024))
    ran: list[object] = []
    monkeypatch.setattr(triton_path, "run", lambda *given: ran.append(given))
    triton_path.warm_up(operand(4, 272, 1024))
    assert not ran
    triton_path.warm_up(operand(4, 288, 1024))
    assert ran


def test_a_kernel_specialized_on_m_would_be_noticed(compiled: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    weight = operand(4, 272, 1024)
    rows_of_x = next(p for p in triton_path.gemm_kernel.params if p.name == "M")
    monkeypatch.setattr(rows_of_x, "do_not_specialize", False)
    triton_path.warm_up(weight)
    ready = set(compiled)
    for rows in MANY_ROWS:
        triton_path.gemm(torch.zeros(rows, 1024, dtype=torch.bfloat16), weight)
    assert compiled > ready
