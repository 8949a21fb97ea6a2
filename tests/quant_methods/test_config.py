"""`VLMQConfig` and `VLMQLinearMethod` against the real classes of vLLM, without an engine."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.quant_methods.checkpoints import quantize, round_to_nearest
from vlmq_serve.format.config import QuantizationSpec
from vlmq_serve.format.errors import VLMQError
from vlmq_serve.format.scheme import Scheme
from vlmq_serve.format.weight import PackedWeight

pytestmark = pytest.mark.serve
LAYER = "language_model.model.layers.0"
RAW = {"quant_method": "vlmq", "format_version": 1, "bits": 4, "group_size": 64, "symmetric": False}


@pytest.fixture(scope="module")
def mapper():
    from vllm.model_executor.models.qwen2_vl import Qwen2VLForConditionalGeneration

    return Qwen2VLForConditionalGeneration.hf_to_vllm_mapper.get_rename_mapper()


def config_of(**changes):
    from vlmq_serve.quant_methods.config import VLMQConfig

    return VLMQConfig.from_config({**RAW, "ignore": ["model.visual", "lm_head"], **changes})


def test_register_is_idempotent_and_vllm_finds_it() -> None:
    from vllm.model_executor.layers.linear import WEIGHT_LOADER_V2_SUPPORTED
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, get_quantization_config

    from vlmq_serve.plugin import register
    from vlmq_serve.quant_methods.config import VLMQConfig

    for _ in range(3):
        register()
    assert QUANTIZATION_METHODS.count("vlmq") == 1
    assert WEIGHT_LOADER_V2_SUPPORTED.count("VLMQLinearMethod") == 1
    assert get_quantization_config("vlmq") is VLMQConfig


def test_config_survives_pickling_and_mapping_twice(mapper) -> None:
    override = {"model.language_model.layers.0.mlp.down_proj": {"bits": 2, "group_size": 32, "symmetric": True}}
    config = config_of(overrides=override)
    config.apply_vllm_mapper(mapper)
    config = pickle.loads(pickle.dumps(config))
    once = config.spec
    config.apply_vllm_mapper(mapper)
    assert config.spec == once
    assert config.scheme_of(f"{LAYER}.mlp.down_proj") == Scheme(2, 32, True)
    assert config.scheme_of(f"{LAYER}.mlp.gate_up_proj") == Scheme(4, 64)
    assert config.scheme_of("visual.blocks.0.attn.qkv") is None
    assert config.scheme_of("language_model.lm_head") is None


def test_simulated_activations_are_said_aloud(caplog: pytest.LogCaptureFixture) -> None:
    assert config_of(settings={"activation_bits": None}).spec.simulated_activations is None
    assert caplog.messages == []
    config_of(settings={"activation_bits": 8})
    assert "activations of 8 bits, by simulation; vLLM serves its weights with activations of 16" in caplog.text


def test_members_of_a_fused_layer_must_agree(mapper) -> None:
    config = config_of(
        overrides={"model.language_model.layers.0.self_attn.k_proj": {"bits": 3, "group_size": 64, "symmetric": False}}
    )
    config.apply_vllm_mapper(mapper)
    with pytest.raises(VLMQError, match=r"qkv_proj: got q_proj=w4g64, k_proj=w3g64, v_proj=w4g64; vLLM fuses"):
        config.scheme_of(f"{LAYER}.self_attn.qkv_proj")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 7}, "format_version: got 7"),
        ({"bits": 5}, "bits: got 5"),
        ({"group_size": 48}, "group_size: got 48"),
        ({"desc_act": True}, "desc_act"),
    ],
)
def test_an_impossible_config_is_one_clear_error(changes: dict, message: str) -> None:
    with pytest.raises(VLMQError, match=message):
        config_of(**changes)


def test_the_method_asked_for_on_a_model_that_is_not_quantized(tiny_model: Path) -> None:
    from vllm.engine.arg_utils import EngineArgs

    with pytest.raises(ValueError, match=r"--quantization: got 'vlmq' for a model without quantization_config"):
        EngineArgs(model=str(tiny_model), quantization="vlmq").create_engine_config()


def test_the_checkpoint_must_hold_what_the_config_says(tiny_model: Path, tmp_path: Path, mapper) -> None:
    config = config_of()
    config.maybe_update_config(str(quantize(tiny_model, tmp_path / "w4", "w4g64")))
    config.apply_vllm_mapper(mapper)
    assert config.inventory.scales_dtype == torch.bfloat16
    assert config.scheme_of(f"{LAYER}.self_attn.qkv_proj") == Scheme(4, 64)
    with pytest.raises(VLMQError, match=r"layers\.9\.self_attn\.q_proj: config\.json says w4g64, but the checkpoint"):
        config.scheme_of("language_model.model.layers.9.self_attn.qkv_proj")


def test_compiled_graphs_are_kept_apart_by_what_chooses_the_kernel(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """vLLM hashes the model's config: with and without a compiler or a table, forced or not, it must differ."""
    from vlmq_serve.kernels import native

    def choice(**overrides: str) -> str:
        hf_config = SimpleNamespace(**overrides)
        config_of().maybe_update_config("not/a-folder", hf_config=hf_config)
        return hf_config.vlmq_compiled_for

    monkeypatch.delenv("VLMQ_KERNEL", raising=False)
    monkeypatch.delenv("VLMQ_TABLE", raising=False)
    found = [choice(), choice(vlmq_kernel="cpu_dequant")]
    table = tmp_path / "table.json"
    monkeypatch.setenv("VLMQ_TABLE", str(table))
    assert choice() == found[0]
    for content in ("{}", '{"vllm": []}'):
        table.write_text(content)
        found.append(choice())
    monkeypatch.delenv("VLMQ_TABLE")
    monkeypatch.setenv("VLMQ_KERNEL", "reference")
    found.append(choice())
    monkeypatch.delenv("VLMQ_KERNEL")
    if native.library() is not None:
        monkeypatch.setattr(native, "library", lambda isa=None: None)
        found.append(choice())
    assert len(set(found)) == len(found)


def test_experts_are_refused_by_name() -> None:
    class RoutedExperts(torch.nn.Module):
        pass

    with pytest.raises(VLMQError, match=r"mlp\.experts: got mixture-of-experts weights"):
        config_of().get_quant_method(RoutedExperts(), f"{LAYER}.mlp.experts")


@pytest.mark.parametrize("scheme", ["w2g32", "w3g64s", "w4g-1"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_row_parallel_rank_gets_its_columns(scheme: str, rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's own parameter classes, told that they are one of two ranks, cut the checkpoint tensors."""
    from vllm.model_executor import parameter

    from vlmq_serve.quant_methods.linear import VLMQLinearMethod

    monkeypatch.setattr(parameter, "get_tensor_model_parallel_rank", lambda: rank)
    monkeypatch.setattr(parameter, "get_tensor_model_parallel_world_size", lambda: 2)
    whole = round_to_nearest(torch.randn(64, 256), Scheme.parse(scheme))
    layer, method = torch.nn.Module(), VLMQLinearMethod(whole.scheme, "down_proj")
    method.create_weights(layer, 128, [64], 256, 64, torch.float32, weight_loader=None)
    for name, tensor in whole.tensors("x").items():
        target = getattr(layer, name.removeprefix("x."))
        is_whole_row = whole.scheme.group_size == -1 and not name.endswith("qweight")
        # The loader of a row-parallel layer calls this; a parameter without input_dim takes the tensor as it is.
        target.data.copy_(tensor) if is_whole_row else target.load_row_parallel_weight(tensor)
    got = PackedWeight(layer.qweight.data, layer.scales.data, getattr(layer, "zeros", None), whole.scheme)
    assert torch.equal(got.dequantize(), whole.dequantize()[:, rank * 128 : rank * 128 + 128])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_layer_multiplies_with_the_dequantized_weight(dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.model_executor import parameter

    from vlmq_serve.quant_methods.linear import VLMQLinearMethod

    monkeypatch.setattr(parameter, "get_tensor_model_parallel_rank", lambda: 0)
    monkeypatch.setattr(parameter, "get_tensor_model_parallel_world_size", lambda: 1)
    weight = round_to_nearest(torch.randn(96, 128), Scheme(3, 32))
    layer, method = torch.nn.Module(), VLMQLinearMethod(weight.scheme, "o_proj", torch.bfloat16)
    method.create_weights(layer, 128, [96], 128, 96, dtype, weight_loader=None)
    for name, tensor in weight.tensors("x").items():
        getattr(layer, name.removeprefix("x.")).data.copy_(tensor)
    method.process_weights_after_loading(layer)
    method.process_weights_after_loading(layer)
    x, bias = torch.randn(2, 5, 128, dtype=dtype), torch.randn(96, dtype=dtype)
    expected = torch.nn.functional.linear(x.float(), weight.dequantize(), bias.float())
    torch.testing.assert_close(
        method.apply(layer, x, bias).float(), expected, atol=0.1 if dtype != torch.float32 else 1e-4, rtol=0.02
    )
    # What was loaded is gone; the repacked weight has the name by which vLLM's LoRA layers find the device.
    assert {name for name, _ in layer.named_parameters()} == {"qweight", "vlmq_scales", "vlmq_zeros"}
    assert layer.qweight.shape != weight.qweight.shape or layer.qweight.dtype != weight.qweight.dtype


def test_spec_of_the_config_is_the_spec_of_the_file() -> None:
    spec = QuantizationSpec(Scheme(3, 32, True), ignore=("lm_head",), producer="test")
    from vlmq_serve.quant_methods.config import VLMQConfig

    assert VLMQConfig.from_config(spec.to_dict()).spec == spec


def test_compiled_graphs_are_found_again_for_the_same_bits_and_kernel_only(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM caches compiled graphs, which hold bits and kernel as constants, under a hash of its config."""
    from vllm.engine.arg_utils import EngineArgs

    def fingerprint(scheme: str) -> str:
        folder = tmp_path / "same-place"
        shutil.rmtree(folder, ignore_errors=True)
        quantize(tiny_model, folder, scheme)
        return str(EngineArgs(model=str(folder), kv_cache_memory_bytes=1 << 26).create_engine_config().compute_hash())

    first = fingerprint("w3g64")
    assert fingerprint("w3g64") == first
    assert fingerprint("w2g64") != first
    monkeypatch.setenv("VLMQ_KERNEL", "reference")
    assert fingerprint("w3g64") != first
