"""The C++ kernels with integer products: every instruction set of this machine against float64."""

import pytest
import torch
from torch.nn.functional import linear as dense

from tests.kernels.weights import exact_weight, random_weight, relative_error
from vlmq_serve.format.weight import PackedWeight
from vlmq_serve.kernels import linear, native, prepare
from vlmq_serve.kernels.integer import DENSE_ROWS, gemm_dense, gemm_integer, prepare_integer

pytestmark = [
    pytest.mark.unit,
    pytest.mark.skipif(native.library() is None, reason="no C++ compiler, or a CPU without AVX2"),
]
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
LIMIT = {BF16: 4e-3, FP16: 5e-4, FP32: 1e-4}
LIMIT_OF_8 = 2e-2


def product(x: torch.Tensor, weight: PackedWeight, isa: str | None = None, x_bits: int = 16) -> torch.Tensor:
    return gemm_integer(x, *prepare_integer(weight), weight.scheme.bits, weight.shape[0], x_bits, isa)


def normal(rows: int, cols: int, dtype: torch.dtype = FP32) -> torch.Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(rows)).to(dtype)


@pytest.fixture(params=native.ISAS)
def isa(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    if name not in native.supported_isas():
        pytest.skip(f"this CPU, or this torch, has no {name}")
    return name


@pytest.fixture(params=[16, 8])
def x_bits(request: pytest.FixtureRequest) -> int:
    bits: int = request.param
    return bits


def rounded(x: torch.Tensor, block: int) -> torch.Tensor:
    """float64 [M, K]: x as int8 with one scale for each row and block of columns."""
    parts = x.double().unflatten(1, (-1, block))
    scales = parts.abs().amax(2, keepdim=True) / 127
    return ((parts / scales).round() * scales).flatten(1)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group", [32, 64, 128, -1])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_8_bit_inputs_lose_what_their_rounding_loses(isa: str, bits: int, group: int, symmetric: bool) -> None:
    for rows, cols in ((64, 256), (100, 1152), (7, 128)):
        weight = random_weight(rows, cols, bits, group, symmetric)
        exact, prepared = exact_weight(weight), prepare_integer(weight)
        block = next(b for b in (128, 64, 32) if weight.scheme.group_length(cols) % b == 0)
        for count in (1, 2, 3, 5, 16, 23):
            for dtype, limit in LIMIT.items():
                x = normal(count, cols, dtype)
                y = gemm_integer(x, *prepared, bits, rows, 8, isa)
                # A value between two integers may be rounded to the other one in fp32.
                assert relative_error(y, rounded(x, block) @ exact.T) <= limit + 1e-3, (rows, cols, count, dtype)
                assert relative_error(y, x.double() @ exact.T) <= LIMIT_OF_8, (rows, cols, count, dtype)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group", [32, 64, 128, -1])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_matches_float64(isa: str, bits: int, group: int, symmetric: bool) -> None:
    for rows, cols in ((64, 256), (100, 1152), (7, 128)):
        weight = random_weight(rows, cols, bits, group, symmetric)
        exact, prepared = exact_weight(weight), prepare_integer(weight)
        for count in (1, 2, 7, 23):
            for dtype, limit in LIMIT.items():
                x = normal(count, cols, dtype)
                expected = x.double() @ exact.T
                error = relative_error(gemm_integer(x, *prepared, bits, rows, isa=isa), expected)
                assert error <= limit, (rows, cols, count, dtype)
                plain = relative_error(dense(x, exact.to(dtype)), expected)
                if dtype != FP32 and rows * count >= 1000:
                    assert error <= 1.1 * plain, (rows, cols, count, dtype)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_dequantized_weights_for_amx(isa: str, bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What serves many rows on a CPU with AMX is the dense product of weights that were rounded once, in parts."""
    monkeypatch.setattr("vlmq_serve.kernels.integer.DENSE_BYTES", 2 * 384 * 32)
    for group, symmetric in ((32, False), (64, True), (-1, False)):
        weight = random_weight(100, 384, bits, group, symmetric)
        x, prepared = normal(DENSE_ROWS, 384, BF16), prepare_integer(weight)
        y = gemm_dense(x, *prepared, bits, 100, isa)
        expected = dense(x.double(), weight.dequantize(BF16).double())
        assert y.is_contiguous()
        assert relative_error(y, expected) <= LIMIT[BF16]
        monkeypatch.setattr("vlmq_serve.kernels.integer.native.cpu_flags", lambda: {"amx_bf16"})
        assert torch.equal(gemm_integer(x, *prepared, bits, 100, isa=isa), y)


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_types_of_scales(isa: str, dtype: torch.dtype) -> None:
    weight = random_weight(48, 256, 3, 64, False, dtype)
    x = normal(5, 256)
    assert relative_error(product(x, weight, isa), x.double() @ exact_weight(weight).T) <= LIMIT[FP32]


def test_more_rows_than_one_pass(isa: str, x_bits: int) -> None:
    weight = random_weight(40, 128, 4, 32, False)
    x = normal(600, 128)
    y = product(x, weight, isa, x_bits)
    limit = LIMIT[FP32] if x_bits == 16 else LIMIT_OF_8
    assert relative_error(y, x.double() @ exact_weight(weight).T) <= limit
    for row in (0, 255, 256, 599):
        alone = product(x[row : row + 1], weight, isa, x_bits)
        torch.testing.assert_close(alone[0], y[row], rtol=1e-5, atol=1e-5)


def test_largest_sums_fit(isa: str, x_bits: int) -> None:
    """All codes and inputs at their extremes, over the longest sum of integers."""
    for bits in (2, 3, 4, 8):
        weight = random_weight(32, 256, bits, 128, False)
        top = torch.full((32, 256), 2**bits - 1)
        for zero in (0, 2**bits - 1):
            zeros = torch.full((32, 2), zero)
            full = PackedWeight.from_codes(top if zero == 0 else 0 * top, weight.scales, zeros, weight.scheme)
            for count, value in ((1, -3.0), (2, -3.0), (1, 3.0), (2, 3.0)):
                x = torch.full((count, 256), value)
                assert relative_error(product(x, full, isa, x_bits), x.double() @ exact_weight(full).T) <= 1e-6


def test_what_is_not_finite_reaches_its_row_only(isa: str, x_bits: int) -> None:
    weight = random_weight(32, 256, 4, 64, False)
    for count in (1, 5):
        x = normal(count, 256)
        clean = product(x, weight, isa, x_bits)
        for value in (float("nan"), float("inf"), -float("inf")):
            broken = x.clone()
            broken[count - 1, 70] = value
            for dtype in (FP32, BF16, FP16):
                y = product(broken.to(dtype), weight, isa, x_bits)
                assert y[count - 1].isnan().all()
            assert torch.equal(product(broken, weight, isa, x_bits)[: count - 1], clean[: count - 1])


def test_inputs_of_any_size(isa: str, x_bits: int) -> None:
    """Zeros give zeros; an outlier costs precision in its own group only; scale of x changes nothing."""
    weight = random_weight(32, 256, 4, 64, False)
    assert torch.equal(product(torch.zeros(3, 256), weight, isa, x_bits), torch.zeros(3, 32))
    limit = LIMIT[FP32] if x_bits == 16 else LIMIT_OF_8
    for factor in (1e-20, 1e20):
        x = normal(3, 256) * factor
        assert relative_error(product(x, weight, isa, x_bits), x.double() @ exact_weight(weight).T) <= limit
    x, loud = normal(3, 256), normal(3, 256)
    loud[:, 0] = 1e6
    quiet = exact_weight(weight)
    quiet[:, :64] = 0
    rest = PackedWeight(weight.qweight, weight.scales.clone(), weight.zeros, weight.scheme)
    rest.scales[:, 0] = 0
    torch.testing.assert_close(product(loud, rest, isa, x_bits), product(x, rest, isa, x_bits))


def test_columns_of_a_wider_tensor(isa: str, x_bits: int) -> None:
    """Rows that are not contiguous with each other, and elements that are not."""
    weight = random_weight(32, 128, 4, 64, False)
    wide = normal(6, 512)
    for part in (wide[:, 128:256], wide[::2, :128], wide[:, ::4], wide[:1].expand(4, 512)[:, :128]):
        assert torch.equal(product(part, weight, isa, x_bits), product(part.contiguous(), weight, isa, x_bits))


def test_same_bits_on_any_number_of_threads(isa: str, x_bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch says is replaced, not set: a vLLM engine in the same process forbids setting it."""
    weight = random_weight(200, 256, 3, 64, False)
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        with monkeypatch.context() as patch:
            patch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
            results.append([product(normal(count, 256), weight, isa, x_bits) for count in (1, 9)])
        assert torch.get_num_threads() == before
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_exact_bits_per_weight_in_memory(bits: int, x_bits: int) -> None:
    prepared = prepare(random_weight(1024, 1024, bits, 128, False), BF16, "cpu", f"cpu_int{x_bits}")
    assert 8 * prepared.nbytes / 2**20 == bits + (16 + 8) / 128


def test_serves_every_width_and_type() -> None:
    """16-bit inputs without being asked, 8-bit ones only when asked."""
    for bits in (2, 3, 4, 8):
        weight = random_weight(32, 64, bits, 32, False)
        for dtype in LIMIT:
            assert prepare(weight, dtype, "cpu").path == "cpu_int16"
            prepared, x = prepare(weight, dtype, "cpu", "cpu_int8"), normal(4, 64, dtype)
            assert torch.equal(linear(x, prepared), product(x, weight, x_bits=8))
