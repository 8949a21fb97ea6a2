"""Exported checkpoints are what compressed-tensors writes, and open in vLLM without our plugin."""

import json
import math
import shutil
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from tests.quant_methods.checkpoints import quantize, quantize_parts, round_to_nearest
from tests.quant_methods.families import write_family
from tests.quant_methods.test_engine import EVALUATION, ask, reference_logprobs
from vlmq_serve.calibrate.chats import read_chats
from vlmq_serve.cli import app
from vlmq_serve.evaluate.loading import load_model
from vlmq_serve.export.compressed_tensors import convert_linear, export_compressed_tensors
from vlmq_serve.format.errors import VLMQError
from vlmq_serve.format.scheme import Scheme
from vlmq_serve.verify.vllm_rules import check_with_vllm

MODEL = Path(__file__).resolve().parents[2] / "examples" / "tiny-qwen2vl"
SUFFIXES = ("qweight", "scales", "zeros")


def converted(text: str, rows: int = 64, columns: int = 128) -> tuple:
    weight = round_to_nearest(torch.randn(rows, columns), Scheme.parse(text))
    parts = {s: getattr(weight, s) for s in SUFFIXES if getattr(weight, s) is not None}
    return weight, convert_linear("x", parts, weight.scheme)


@pytest.mark.unit
@pytest.mark.parametrize("scheme", ["w2g32", "w4g64", "w4g-1", "w2g64s"])
def test_their_own_unpacking_gives_our_codes_and_zero_points(scheme: str) -> None:
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    weight, theirs = converted(scheme)
    bits, middle = weight.scheme.bits, weight.scheme.mid_code
    codes = helpers.unpack_from_int32(theirs["x.weight_packed"], bits, torch.Size(weight.shape))
    assert torch.equal(codes.int() + middle, weight.codes().int())
    if weight.zeros is not None:
        packed = theirs["x.weight_zero_point"]
        zeros = helpers.unpack_from_int32(packed, bits, weight.zeros.shape, packed_dim=0)
        assert torch.equal(zeros.int() + middle, weight.zeros.int())


@pytest.mark.unit
@pytest.mark.parametrize("scheme", ["w2g32", "w3g32", "w4g64", "w3g-1", "w3g32s"])
def test_shapes_are_those_that_vllm_allocates(scheme: str) -> None:
    """The formulas of `CompressedTensorsWNA16.create_weights` (vLLM 0.32)."""
    weight, theirs = converted(scheme, 96, 256)
    bits, groups = weight.scheme.bits, weight.scales.shape[1]
    assert theirs["x.weight_packed"].shape == (96, math.ceil(256 * Fraction(bits, 32)))
    assert theirs["x.weight_scale"].shape == (96, groups)
    assert theirs["x.weight_shape"].tolist() == [96, 256]
    if not weight.scheme.symmetric:
        assert theirs["x.weight_zero_point"].shape == (math.ceil(96 * bits / 32), groups)
        assert theirs["x.weight_zero_point"].dtype == torch.int32


@pytest.mark.unit
def test_every_scheme_has_a_group_of_its_own(tmp_path: Path) -> None:
    overrides = {"model.layers.0.mlp": "w2g64", "model.layers.1.self_attn.o_proj": "w8g-1"}
    settings = {"overrides": overrides, "lm_head": "w8g64", "vision": "w4g32", "embeddings": "w4g64"}
    mixed = quantize_parts(MODEL, tmp_path / "mixed", "w4g64", **settings)
    export_compressed_tensors(mixed, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    groups = {(g["weights"]["num_bits"], g["weights"]["group_size"]): g for g in config["config_groups"].values()}
    assert groups[4, 64]["targets"] == ["Linear"]
    assert groups[2, 64]["targets"] == [f"model.layers.0.mlp.{name}_proj" for name in ("down", "gate", "gate_up", "up")]
    assert groups[8, None]["targets"] == ["model.layers.1.self_attn.o_proj"]
    assert groups[8, None]["weights"]["strategy"] == "channel"
    assert groups[8, 64]["targets"] == ["re:.*lm_head"]
    assert len(groups[4, 32]["targets"]) == 14
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert tensors["lm_head.weight_packed"].shape == (512, 192 * 8 // 32)
    assert not any("lm_head" in name for name in config["ignore"])
    # vLLM's method for this form has no packed embeddings.
    table = load_model(mixed, torch.bfloat16).get_input_embeddings().weight
    assert torch.equal(tensors["model.embed_tokens.weight"], table)
    assert "model.embed_tokens" in config["ignore"]


@pytest.mark.unit
@pytest.mark.parametrize(
    ("cut", "vision", "message"),
    [
        (("layers.0.mlp.up_proj", "layers.0.mlp.gate_proj"), None, r"gate_proj: 180 rows .*with --symmetric"),
        (("visual.blocks.0.mlp.fc1",), "w4g32", r"fc1: 180 rows .*without --vision"),
    ],
)
def test_rows_that_do_not_fill_a_word_are_refused_and_nothing_is_written(
    tmp_path: Path, cut: tuple[str, ...], vision: str | None, message: str
) -> None:
    """The tower is to stay plain then: without zero points it would be written, and refused by vLLM on a CPU."""
    source = shutil.copytree(MODEL, tmp_path / "source", ignore=shutil.ignore_patterns("*.md"))
    tensors = load_file(source / "model.safetensors")
    for name in tensors:
        if name.removesuffix(".weight").endswith(cut):
            tensors[name] = tensors[name][:180].clone()
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    checkpoint = quantize_parts(source, tmp_path / "w4", "w4g64", vision=vision)
    with pytest.raises(VLMQError, match=message):
        export_compressed_tensors(checkpoint, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "w4"]


@pytest.mark.serve
def test_vllm_opens_w4_without_our_plugin(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor finds its parameter."""
    assert not any(name.endswith(SUFFIXES) for name in load_file(exported / "model.safetensors"))
    monkeypatch.setenv("VLLM_PLUGINS", "")
    (finding,) = check_with_vllm(exported, 1)
    assert finding.level == "ok", finding.message


@pytest.mark.serve
@pytest.mark.parametrize("vision", [None, "w4g32"])
def test_vllm_opens_a_tower_whose_fused_layers_its_model_class_does_not_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vision: str | None
) -> None:
    source = write_family("llava_onevision", MODEL, tmp_path / "source")
    checkpoint = quantize_parts(source, tmp_path / "w4", "w4g64", vision=vision)
    export_compressed_tensors(checkpoint, tmp_path / "out")
    monkeypatch.setenv("VLLM_PLUGINS", "")
    (finding,) = check_with_vllm(tmp_path / "out", 1)
    assert finding.level == "ok", finding.message


@pytest.mark.serve
@pytest.mark.skipif(not torch.cpu._is_avx512_supported(), reason="vLLM's own W4 kernel for CPUs needs AVX-512")
def test_w4_answers_of_vllms_own_method_are_those_of_transformers(
    checkpoint: Path, exported: Path, engine: Callable[..., Any]
) -> None:
    """Two group sizes, bfloat16, which vLLM's kernel asks for; no layer is one of ours."""
    from transformers import AutoProcessor

    processor, chats = AutoProcessor.from_pretrained(checkpoint), read_chats(EVALUATION)[:4]
    model = load_model(checkpoint, torch.bfloat16)
    llm = engine(exported, dtype="bfloat16")
    (methods,) = llm.apply_model(method_names)
    assert "CompressedTensorsLinearMethod" in methods
    assert "VLMQLinearMethod" not in methods
    for chat, answer in zip(chats, ask(llm, processor, chats), strict=True):
        tokens = list(answer.token_ids)
        expected = reference_logprobs(model, processor, chat, tokens)
        for step, token in enumerate(tokens):
            assert answer.logprobs[step][token].logprob == pytest.approx(float(expected[step, token]), abs=0.05)


def method_names(model: torch.nn.Module) -> set[str]:
    return {type(getattr(module, "quant_method", None)).__name__ for module in model.modules()}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantize(MODEL, tmp_path_factory.mktemp("export") / "w4", "w4g64", {"model.layers.0.mlp": "w4g32"})


@pytest.fixture(scope="module")
def exported(checkpoint: Path) -> Path:
    out = checkpoint.with_name("out")
    arguments = ["export", str(checkpoint), "-o", str(out), "--to", "compressed-tensors"]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    return out
