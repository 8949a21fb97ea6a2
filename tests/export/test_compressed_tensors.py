"""Exported checkpoints are what compressed-tensors writes, and open in vLLM without our plugin."""

import math
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from tests.quant_methods.checkpoints import quantize, round_to_nearest
from vlmq_serve.cli import app
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
def test_more_than_one_scheme_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    mixed = quantize(MODEL, tmp_path / "mixed", "w4g64", {"model.layers.0.mlp": "w2g64"})
    with pytest.raises(VLMQError, match=r"got the schemes \['w2g64', 'w4g64'\]"):
        export_compressed_tensors(mixed, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mixed"]


@pytest.mark.serve
def test_vllm_opens_w4_without_our_plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor finds its parameter; multiplying needs a GPU or AVX-512, which vLLM's own W4 kernel is made for."""
    checkpoint = quantize(MODEL, tmp_path / "w4", "w4g64")
    arguments = ["export", str(checkpoint), "-o", str(tmp_path / "out"), "--to", "compressed-tensors"]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    assert not any(name.endswith(SUFFIXES) for name in load_file(tmp_path / "out" / "model.safetensors"))
    monkeypatch.setenv("VLLM_PLUGINS", "")
    (finding,) = check_with_vllm(tmp_path / "out", 1)
    assert finding.level == "ok", finding.message
