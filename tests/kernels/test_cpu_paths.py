"""Every CPU path against the float64 product of the same weights."""

import logging
from dataclasses import replace

import pytest
import torch

from tests.kernels.weights import exact_weight, random_weight, relative_error
from vlmq_serve.format.errors import VLMQError
from vlmq_serve.format.scheme import ALLOWED_BITS
from vlmq_serve.format.weight import PackedWeight
from vlmq_serve.kernels import PreparedWeight, linear, nibbles, prepare
from vlmq_serve.kernels.choice import ENVIRONMENT, choose_path

pytestmark = pytest.mark.unit

needs_int4 = pytest.mark.skipif(nibbles.int4_kernel_block() is None, reason="torch has no int4 kernel here")
LIMIT = {torch.bfloat16: 1e-2, torch.float16: 1e-3, torch.float32: 1e-5}


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group", [32, 64, 128, -1])
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize(
    ("path", "dtype"),
    [
        *((path, dtype) for path in ("reference", "cpu_dequant") for dtype in LIMIT),
        pytest.param("cpu_int4", torch.bfloat16, marks=needs_int4),
    ],
)
def test_paths_match_float64(path: str, dtype: torch.dtype, bits: int, group: int, symmetric: bool) -> None:
    for rows, cols in ((64, 256), (100, 384), (7, 128)):
        weight = random_weight(rows, cols, bits, group, symmetric)
        exact = exact_weight(weight)
        prepared = prepare(weight, dtype, "cpu", path)
        for count in (1, 5, 33, 97):
            x = torch.randn(count, cols, generator=torch.Generator().manual_seed(count)).to(dtype)
            expected = x.double() @ exact.T
            error = relative_error(linear(x, prepared), expected)
            plain = relative_error(torch.nn.functional.linear(x, exact.to(dtype)), expected)
            assert error <= LIMIT[dtype]
            # No worse than the dense product of the same type, whose weights are rounded too; on few numbers
            # the two are different draws of the same rounding noise.
            slack = 1.1 if rows * count >= 1000 else 2.0
            assert error <= slack * plain + 1e-6, (rows, cols, count, error, plain)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_few_and_many_rows_agree(bits: int) -> None:
    prepared = prepare(random_weight(128, 512, bits, 128, False), torch.bfloat16, "cpu")
    x = torch.randn(97, 512).bfloat16()
    together = linear(x, prepared)
    for start in (0, 50, 96):
        alone = linear(x[start : start + 1], prepared)
        assert relative_error(alone, together[start : start + 1].double()) <= 6e-3


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("group", [32, -1])
def test_dequantized_blocks_are_exact(bits: int, group: int) -> None:
    """The blocks of both layouts give back the reference weight bit for bit, also from the rounded int4 terms."""
    from vlmq_serve.kernels.cpu import dequantize_blocks

    weight = random_weight(96, 128, bits, group, False)
    for path in ("cpu_dequant", *(["cpu_int4"] if nibbles.int4_kernel_block() else [])):
        prepared = prepare(weight, torch.float32 if path == "cpu_dequant" else torch.bfloat16, "cpu", path)
        blocks, cols, half = prepared.qdata.shape
        out = torch.empty(blocks, cols, 2 * half)
        dequantize_blocks(prepared.qdata, prepared.scales, prepared.zeros, 0, blocks, out)
        rebuilt = out.transpose(1, 2).reshape(-1, cols)[:96]
        assert torch.equal(rebuilt, weight.dequantize())


def test_zero_scales_give_zero_weights() -> None:
    weight = random_weight(64, 128, 3, 64, False)
    weight = PackedWeight(weight.qweight, torch.zeros_like(weight.scales), weight.zeros, weight.scheme)
    for count in (1, 100):
        y = linear(torch.randn(count, 128).bfloat16(), prepare(weight, torch.bfloat16, "cpu"))
        assert torch.equal(y, torch.zeros(count, 64, dtype=torch.bfloat16))


@pytest.mark.parametrize(
    "path",
    ["reference", "cpu_dequant", "cpu_int16", pytest.param("cpu_int4", marks=needs_int4)],
)
def test_shapes_bias_and_empty_input(path: str) -> None:
    weight = random_weight(80, 128, 4, 32, False)
    prepared = prepare(weight, torch.bfloat16, "cpu", path)
    bias = torch.randn(80).bfloat16()
    x = torch.randn(2, 3, 128).bfloat16()
    y = linear(x, prepared, bias)
    assert y.shape == (2, 3, 80)
    assert torch.equal(y.reshape(6, 80), linear(x.reshape(6, 128), prepared, bias))
    strided = torch.randn(5, 256).bfloat16()[:, ::2]
    assert torch.equal(linear(strided, prepared), linear(strided.contiguous(), prepared))
    for shape in ((0, 128), (2, 0, 128)):
        empty = linear(torch.empty(shape, dtype=torch.bfloat16), prepared, bias)
        assert empty.shape == (*shape[:-1], 80)


@pytest.mark.parametrize("block", [32, 64])
def test_nibbles_round_trip_and_use_every_bit(block: int) -> None:
    codes = torch.arange(16 * 16).reshape(1, -1).expand(block, -1).clone()
    codes = (codes * torch.arange(1, block + 1)[:, None]) % 16
    packed = nibbles.pack_nibbles(codes, block)
    assert packed.shape == (1, 256, block // 2)
    assert torch.equal(nibbles.unpack_nibbles(packed), codes.to(torch.uint8))


@needs_int4
def test_nibbles_equal_torchs_own_packing() -> None:
    block = nibbles.int4_kernel_block()
    assert block is not None
    codes = torch.randint(0, 16, (192, 96), dtype=torch.int32)
    theirs = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    assert torch.equal(nibbles.pack_nibbles(codes, block).reshape(-1), theirs.reshape(-1))


@needs_int4
def test_four_bits_per_weight_in_memory() -> None:
    for bits in (2, 3, 4):
        prepared = prepare(random_weight(128, 1024, bits, 128, False), torch.bfloat16, "cpu", "cpu_int4")
        assert 8 * prepared.nbytes / (128 * 1024) == 4 + 2 * 16 / 128


def test_group_size_is_the_real_one() -> None:
    prepared = prepare(random_weight(64, 384, 4, -1, True), torch.bfloat16, "cpu")
    assert (prepared.group_size, prepared.out_features, prepared.in_features) == (384, 64, 384)


def test_eight_bits_without_a_compiler_are_served_by_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlmq_serve.kernels.choice.native.library", lambda: None)
    weight = random_weight(64, 128, 8, 64, False)
    prepared = prepare(weight, torch.float32, "cpu")
    assert prepared.path == "reference"
    x = torch.randn(3, 128)
    assert relative_error(linear(x, prepared), x.double() @ exact_weight(weight).T) < 1e-5


def test_machine_without_a_known_int4_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another layout, or none, is no error: exact blocks serve."""
    monkeypatch.setattr("vlmq_serve.kernels.choice.native.library", lambda: None)
    monkeypatch.setattr("vlmq_serve.kernels.choice.int4_kernel_block", lambda: None)
    assert prepare(random_weight(64, 128, 4, 64, False), torch.bfloat16, "cpu").path == "cpu_dequant"
    with pytest.raises(VLMQError, match="no int4 kernel"):
        choose_path(4, torch.bfloat16, torch.device("cpu"), "cpu_int4")
    with pytest.raises(VLMQError, match=r"needs a C\+\+ compiler"):
        choose_path(4, torch.bfloat16, torch.device("cpu"), "cpu_int16")


@pytest.mark.parametrize(
    ("dtype", "compiler", "expected"),
    [
        (torch.bfloat16, True, "cpu_int16"),
        (torch.float32, True, "cpu_int16"),
        (torch.bfloat16, False, "cpu_int4"),
        (torch.float32, False, "cpu_dequant"),
    ],
)
def test_choice_with_and_without_a_compiler(
    dtype: torch.dtype, compiler: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vlmq_serve.kernels.choice.native.library", lambda: object() if compiler else None)
    monkeypatch.setattr("vlmq_serve.kernels.choice.int4_kernel_block", lambda: 32)
    for bits in (2, 3, 4):
        assert choose_path(bits, dtype, torch.device("cpu")) == expected


def test_bf16_arithmetic_where_the_cpu_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The branch for AVX512-BF16 and AMX machines gives the dense bf16 product, whose weights are rounded once."""
    monkeypatch.setattr("vlmq_serve.kernels.cpu.cpu_has_bf16", lambda: True)
    weight = random_weight(128, 256, 4, 64, False)
    x = torch.randn(70, 256).bfloat16()
    y = linear(x, prepare(weight, torch.bfloat16, "cpu", "cpu_dequant"))
    assert relative_error(y, x.double() @ exact_weight(weight).T) <= LIMIT[torch.bfloat16]


def test_path_by_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = random_weight(64, 128, 4, 64, False)
    monkeypatch.setenv(ENVIRONMENT, "reference")
    assert prepare(weight, torch.bfloat16, "cpu").path == "reference"
    monkeypatch.setenv(ENVIRONMENT, "warp-drive")
    with pytest.raises(VLMQError, match=r"VLMQ_KERNEL: got 'warp-drive', allowed .*cpu_int4"):
        prepare(weight, torch.bfloat16, "cpu")


@pytest.mark.parametrize(
    ("path", "bits", "dtype", "reason"),
    [
        ("cpu_int4", 4, torch.float32, "bfloat16 only"),
        ("cpu_dequant", 8, torch.float32, "bits"),
        ("cpu_int4", 8, torch.bfloat16, "bits"),
        ("triton", 4, torch.float32, "float16 or bfloat16"),
        ("triton", 4, torch.bfloat16, "NVIDIA GPU"),
    ],
)
def test_forced_path_that_cannot_serve(
    path: str, bits: int, dtype: torch.dtype, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(VLMQError, match=reason):
        choose_path(bits, dtype, torch.device("cpu"), path)


def test_choice_on_a_gpu_needs_no_gpu_to_be_decided() -> None:
    for bits in ALLOWED_BITS:
        assert choose_path(bits, torch.bfloat16, torch.device("cuda")) == "triton"
    assert choose_path(3, torch.float32, torch.device("cuda")) == "reference"


def test_choice_is_logged_once_per_shape(caplog: pytest.LogCaptureFixture) -> None:
    weight = random_weight(64, 224, 2, 32, False)
    with caplog.at_level(logging.INFO, logger="vlmq_serve.kernels.choice"):
        for _ in range(3):
            prepare(weight, torch.float16, "cpu", "cpu_dequant")
    lines = [r.getMessage() for r in caplog.records]
    assert lines == ["W2 group 32, N=64 K=224, float16: cpu_dequant (4.75 bits per weight in memory)"]


def test_prepared_weight_is_rebuilt_from_its_parts() -> None:
    prepared = prepare(random_weight(64, 128, 4, 64, False), torch.bfloat16, "cpu")
    parts = {f: getattr(prepared, f) for f in PreparedWeight.__dataclass_fields__}
    x = torch.randn(2, 128).bfloat16()
    assert torch.equal(linear(x, PreparedWeight(**parts)), linear(x, prepared))


@pytest.mark.parametrize("path", ["cpu_dequant", pytest.param("cpu_int4", marks=needs_int4)])
def test_scales_and_zeros_that_are_not_contiguous(path: str) -> None:
    prepared = prepare(random_weight(64, 128, 4, 32, False), torch.bfloat16, "cpu", path)
    strided = [t.transpose(0, -1).contiguous().transpose(0, -1) for t in (prepared.scales, prepared.zeros)]
    assert not strided[0].is_contiguous()
    x = torch.randn(3, 128).bfloat16()
    assert torch.equal(linear(x, replace(prepared, scales=strided[0], zeros=strided[1])), linear(x, prepared))
