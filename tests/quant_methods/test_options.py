"""What the user asks of one start: environment variables, and `--hf-overrides`."""

import pickle
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
from vllm.model_executor.layers.linear import LinearBase

from tests.kernels.weights import random_weight
from vlmq_serve.format.config import QuantizationSpec
from vlmq_serve.format.errors import VLMQError
from vlmq_serve.format.scheme import Scheme
from vlmq_serve.kernels.choice import choose_path
from vlmq_serve.quant_methods.config import VLMQConfig
from vlmq_serve.quant_methods.linear import VLMQLinearMethod

pytestmark = [pytest.mark.unit]


def config_for(**overrides: str) -> VLMQConfig:
    config = VLMQConfig(QuantizationSpec(Scheme(4, 128, True)))
    config.maybe_update_config("not/a-folder", hf_config=SimpleNamespace(**overrides))
    return config


@pytest.mark.parametrize(
    ("environment", "override", "expected"),
    [(None, None, "auto"), ("triton", "vllm", "triton"), (None, "vllm", "vllm"), ("", "triton", "triton")],
)
def test_the_environment_wins_over_the_command_line(
    environment: str | None, override: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if environment is None:
        monkeypatch.delenv("VLMQ_BACKEND", raising=False)
    else:
        monkeypatch.setenv("VLMQ_BACKEND", environment)
    hf_config = SimpleNamespace() if override is None else SimpleNamespace(vlmq_backend=override)
    config = VLMQConfig(QuantizationSpec(Scheme(4, 128)))
    config.maybe_update_config("not/a-folder", hf_config=hf_config)
    assert config.backend == hf_config.vlmq_backend == expected


@pytest.mark.parametrize(("variable", "override"), [("VLMQ_BACKEND", "vlmq_backend"), ("VLMQ_KERNEL", "vlmq_kernel")])
def test_what_is_unknown_is_one_error(variable: str, override: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, "Marlin")
    with pytest.raises(VLMQError, match=f"^{variable}: got 'Marlin', allowed "):
        config_for()
    monkeypatch.setenv(variable, "")
    with pytest.raises(VLMQError, match=rf"^{override} \(--hf-overrides or config.json\): got 'Humming', allowed "):
        config_for(**{override: "Humming"})


def test_a_kernel_of_ours_is_none_of_vllms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLMQ_BACKEND", raising=False)
    monkeypatch.delenv("VLMQ_KERNEL", raising=False)
    assert config_for(vlmq_kernel="reference").backend == "triton"  # whatever a table says
    with pytest.raises(VLMQError, match=r"kernel: got 'reference' on backend 'vllm'.*leave one of them out"):
        config_for(vlmq_kernel="reference", vlmq_backend="vllm")


@pytest.fixture
def one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.model_executor import parameter

    monkeypatch.setattr(parameter, "get_tensor_model_parallel_rank", lambda: 0)
    monkeypatch.setattr(parameter, "get_tensor_model_parallel_world_size", lambda: 1)


def load(config: VLMQConfig, bits: int = 4) -> VLMQLinearMethod:
    """A layer's method, from a config that has travelled to a worker, after loading."""
    config = pickle.loads(pickle.dumps(config))
    linear = MagicMock(spec=LinearBase)
    method = config.get_quant_method(linear, "model.layers.0.self_attn.o_proj")
    assert isinstance(method, VLMQLinearMethod)
    layer, weight = torch.nn.Module(), random_weight(64, 128, bits, 128, True)
    method.create_weights(layer, 128, [64], 128, 64, torch.bfloat16, weight_loader=None)
    layer.qweight.data, layer.scales.data = weight.qweight, weight.scales
    method.process_weights_after_loading(layer)
    return method


@pytest.mark.parametrize(
    ("environment", "override", "expected"),
    [("", "cpu_dequant", "cpu_dequant"), ("reference", "cpu_dequant", "reference"), ("", "", None)],
)
@pytest.mark.usefixtures("one_rank")
def test_kernel_of_a_layer(
    environment: str, override: str, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLMQ_KERNEL", environment)
    config = config_for(vlmq_kernel=override)
    monkeypatch.delenv("VLMQ_KERNEL")  # what was read once holds
    automatic = choose_path(4, torch.bfloat16, torch.device("cpu"))
    assert load(config).path == (expected or automatic)


@pytest.mark.usefixtures("one_rank")
def test_a_kernel_that_cannot_serve_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLMQ_KERNEL", raising=False)
    with pytest.raises(VLMQError, match=r"^kernel: got 'triton', which cannot serve W4 with torch.bfloat16 on cpu"):
        load(config_for(vlmq_kernel="triton"))
