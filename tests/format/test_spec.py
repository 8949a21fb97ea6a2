"""Schemes, packed weights and the config.json entry."""

import pytest
import torch

from vlmq_serve.format.config import QuantizationSpec
from vlmq_serve.format.errors import VLMQError
from vlmq_serve.format.names import fused_groups, fused_members, is_under
from vlmq_serve.format.scheme import ALLOWED_BITS, ALLOWED_GROUP_SIZES, Scheme
from vlmq_serve.format.weight import PackedWeight


@pytest.mark.parametrize("bits", ALLOWED_BITS)
@pytest.mark.parametrize("group_size", ALLOWED_GROUP_SIZES)
@pytest.mark.parametrize("symmetric", [False, True])
def test_scheme_string_round_trip(bits: int, group_size: int, symmetric: bool) -> None:
    scheme = Scheme(bits, group_size, symmetric)
    assert Scheme.parse(str(scheme)) == scheme


@pytest.mark.parametrize("text", ["w5g128", "w4g48", "w4", "4g128", "w4g128x", ""])
def test_bad_scheme_strings(text: str) -> None:
    with pytest.raises(VLMQError, match="got"):
        Scheme.parse(text)


def test_rows_that_do_not_divide() -> None:
    with pytest.raises(VLMQError, match="multiple of 32"):
        Scheme(4, 32).num_groups(100)
    with pytest.raises(VLMQError, match=r"use one of \[32, 64, -1\]"):
        Scheme(4, 128).num_groups(192)
    assert Scheme(3, -1).num_groups(192) == 1


def random_weight(scheme: Scheme, rows: int = 6, cols: int = 256) -> tuple[PackedWeight, torch.Tensor]:
    generator = torch.Generator().manual_seed(scheme.bits)
    groups = scheme.num_groups(cols)
    codes = torch.randint(0, scheme.max_code + 1, (rows, cols), generator=generator)
    scales = torch.rand(rows, groups, generator=generator) + 0.1
    zeros = None if scheme.symmetric else torch.randint(0, scheme.max_code + 1, (rows, groups), generator=generator)
    expected = torch.empty(rows, cols)
    length = scheme.group_length(cols)
    for n in range(rows):
        for k in range(cols):
            zero = scheme.mid_code if zeros is None else int(zeros[n, k // length])
            expected[n, k] = (int(codes[n, k]) - zero) * scales[n, k // length]
    return PackedWeight.from_codes(codes, scales, zeros, scheme), expected


@pytest.mark.parametrize("at_once", [2**24, 4 * 256, 1])
@pytest.mark.parametrize("text", ["w2g32", "w3g64", "w4g128", "w3g-1", "w4g64s", "w8g128"])
def test_dequantize_is_the_formula(text: str, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of six rows: all together, four and two, or one by one."""
    monkeypatch.setattr("vlmq_serve.format.weight._NUMBERS_AT_ONCE", at_once)
    weight, expected = random_weight(Scheme.parse(text))
    assert weight.shape == (6, 256)
    torch.testing.assert_close(weight.dequantize(), expected, rtol=0, atol=0)
    assert set(weight.tensors("x")) == {"x.qweight", "x.scales"} | (set() if text.endswith("s") else {"x.zeros"})


def test_packed_weight_checks_its_parts() -> None:
    weight, _ = random_weight(Scheme(4, 64))
    with pytest.raises(VLMQError, match="scales: got shape"):
        PackedWeight(weight.qweight, weight.scales[:, :-1], weight.zeros, weight.scheme)
    with pytest.raises(VLMQError, match="zeros: got none"):
        PackedWeight(weight.qweight, weight.scales, None, weight.scheme)


SPEC = QuantizationSpec(
    Scheme(3, 64),
    overrides={"model.layers.0.mlp.down_proj": Scheme(4, 64), "model.layers.1": Scheme(2, 32)},
    ignore=("visual", "lm_head"),
    method="vlmq",
    settings={"percdamp": 0.01},
    producer="vlmq-serve test",
)


def test_spec_round_trip() -> None:
    assert QuantizationSpec.from_dict(SPEC.to_dict()) == SPEC


@pytest.mark.parametrize(
    ("name", "scheme"),
    [
        ("model.layers.0.mlp.down_proj", "w4g64"),
        ("model.layers.0.mlp.up_proj", "w3g64"),
        ("model.layers.1.mlp.up_proj", "w2g32"),
        ("model.layers.10.mlp.up_proj", "w3g64"),
        ("model.visual.blocks.0.attn.qkv", None),
        ("language_model.lm_head", None),
    ],
)
def test_scheme_for(name: str, scheme: str | None) -> None:
    assert SPEC.scheme_for(name) == (scheme and Scheme.parse(scheme))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 9}, r"format_version: got 9, this vlmq-serve reads 1"),
        ({"format_version": None}, "format_version"),
        ({"bits": 5}, "bits: got 5, allowed"),
        ({"bits": "4"}, "bits='4'"),
        ({"group_size": 48}, "group_size: got 48"),
        ({"quant_method": "gptq"}, "quant_method: got 'gptq'"),
        ({"ignore": "lm_head"}, "ignore a list"),
        ({"desc_act": True}, "unknown keys"),
        ({"overrides": {"a": {"bits": 4}}}, "missing"),
    ],
)
def test_bad_configs(change: dict, message: str) -> None:
    with pytest.raises(VLMQError, match=message):
        QuantizationSpec.from_dict({**SPEC.to_dict(), **change})


def test_fused_layers_agree() -> None:
    names = [f"m.layers.0.self_attn.{p}_proj" for p in "qkvo"]
    assert fused_groups(names) == {"m.layers.0.self_attn.qkv_proj": names[:3], "m.layers.0.self_attn.o_proj": names[3:]}
    assert fused_members("m.layers.0.self_attn.qkv_proj") == names[:3]
    assert fused_members("lm_head") == ["lm_head"]
    QuantizationSpec(Scheme(4)).check_fused(names)
    mixed = QuantizationSpec(Scheme(4), overrides={names[1]: Scheme(2)})
    with pytest.raises(VLMQError, match="k_proj=w2g128"):
        mixed.check_fused(names)


def test_is_under() -> None:
    assert is_under("model.visual.blocks.0", "visual")
    assert is_under("visual", "visual")
    assert not is_under("model.layers.10.mlp", "layers.1")
