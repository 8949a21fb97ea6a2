"""`backend`: who serves a layer, and vLLM's own kernels with our weights, on this CPU."""

from typing import Any

import pytest
import torch

from vlmq_serve.cli.bench.peers.vllm import start_single_rank
from vlmq_serve.format.errors import VLMQError
from vlmq_serve.format.scheme import Scheme
from vlmq_serve.kernels.bench.layers import Layer, random_weight
from vlmq_serve.quant_methods import backend
from vlmq_serve.quant_methods.linear import VLMQLinearMethod

pytestmark = [pytest.mark.serve, pytest.mark.usefixtures("single_rank")]

CPU = torch.device("cpu")
LAYER = Layer("test", "any", 96, 256)
BF16 = torch.bfloat16


def has_cpu_kernel() -> bool:
    import vllm._custom_ops as ops

    return hasattr(torch.ops._C, "cpu_gemm_wna16") and hasattr(ops, "cpu_gemm_wna16")


@pytest.fixture(scope="module")
def single_rank() -> Any:
    start_single_rank()
    yield
    from vllm.distributed import cleanup_dist_env_and_memory

    cleanup_dist_env_and_memory()


def loaded(scheme: Scheme, name: str, dtype: torch.dtype = BF16) -> tuple[VLMQLinearMethod, Any, torch.Tensor]:
    """A method and its layer after loading, and the exact weight."""
    weight = random_weight(LAYER, scheme, dtype, CPU)
    method = VLMQLinearMethod(scheme, "model.layers.0.self_attn.qkv_proj", dtype, name)
    layer = torch.nn.Module()
    rows = [64, 16, 16]
    method.create_weights(layer, 256, rows, 256, sum(rows), dtype, weight_loader=lambda *_: None)
    for suffix in ("qweight", "scales", "zeros"):
        given = getattr(weight, suffix)
        if given is not None:
            getattr(layer, suffix).data.copy_(given)
    method.process_weights_after_loading(layer)
    return method, layer, weight.dequantize()


@pytest.mark.parametrize("scheme", [Scheme(4, 64), Scheme(4, 32, True), Scheme(4, -1)], ids=str)
def test_vllms_kernel_multiplies_with_our_weights(scheme: Scheme) -> None:
    if not has_cpu_kernel():
        pytest.skip("vLLM has no 4-bit kernel for this CPU (it needs AVX512)")
    method, layer, exact = loaded(scheme, "vllm")
    assert method.path == "CPUWNA16LinearKernel"
    assert not hasattr(layer, "qweight")
    bias = torch.randn(96).bfloat16()
    for shape in ((1, 256), (5, 256), (2, 3, 256)):
        x = torch.randn(shape).bfloat16()
        y = method.apply(layer, x, bias)
        assert (y.shape, y.dtype) == ((*shape[:-1], 96), BF16)
        expected = x.double() @ exact.double().T + bias.double()
        assert float((y.double() - expected).norm() / expected.norm()) < 1e-2


@pytest.mark.parametrize("bias", [None, torch.zeros(96)], ids=["without", "with"])
def test_a_layer_says_whether_it_has_a_bias(bias: torch.Tensor | None) -> None:
    """Humming asks; vLLM's linear layers say it, its head and a bare module do not."""
    layer = torch.nn.Module()
    layer.bias = None if bias is None else torch.nn.Parameter(bias)
    weight = random_weight(LAYER, Scheme(3, 64), BF16, CPU)
    backend.add_parameters(layer, weight, BF16, [96])
    assert layer.has_bias == (bias is not None)


@pytest.mark.parametrize("name", ["auto", "triton"])
def test_ours_serve_without_a_table(name: str) -> None:
    method, layer, exact = loaded(Scheme(3, 64), name)
    assert method.kernel is None
    x = torch.randn(4, 256).bfloat16()
    expected = x.double() @ exact.double().T
    assert float((method.apply(layer, x).double() - expected).norm() / expected.norm()) < 1e-2


@pytest.mark.parametrize(
    ("scheme", "dtype", "reason"),
    [
        (Scheme(3, 64), BF16, "CPUWNA16"),
        (Scheme(2, 32), BF16, "CPUWNA16"),
        (Scheme(4, 64), torch.float32, "float16 or"),
    ],
)
def test_what_vllm_cannot_serve_is_one_error(scheme: Scheme, dtype: torch.dtype, reason: str) -> None:
    with pytest.raises(VLMQError, match=reason) as caught:
        loaded(scheme, "vllm", dtype)
    text = str(caught.value)
    assert "self_attn.qkv_proj: backend 'vllm'" in text
    assert "use 'auto' or 'triton'" in text
    assert "\n" not in text


def test_a_table_gives_a_layer_to_vllm_and_ours_stay_where_it_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "prefers_vllm", lambda *_: True)
    shape = (256, 96)
    given = ("model.layers.0.mlp.down_proj", Scheme(3, 64), BF16, shape, shape, CPU)
    assert backend.find_kernel("auto", *given) is None
    if has_cpu_kernel():
        found = backend.find_kernel("auto", given[0], Scheme(4, 64), *given[2:])
        assert found is not None
        assert found.name == "CPUWNA16LinearKernel"
    assert backend.find_kernel("triton", *given) is None
