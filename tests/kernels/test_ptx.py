"""The kernels as compiled for sm_80 and sm_90: their PTX runs on the CPU, and what makes it run is tested itself."""

import re
from itertools import product

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from tests.kernels.ptx import cases, floats
from tests.kernels.ptx.launch import SHARED_START, Launch
from tests.kernels.ptx.memory import Traffic
from tests.kernels.ptx.program import NotModelledError, parse
from tests.kernels.weights import relative_error
from vlmq_serve.format.scheme import ALLOWED_BITS, Scheme
from vlmq_serve.format.weight import PackedWeight
from vlmq_serve.kernels.compile_report import GEMM, GEMV, WRITE, Variant, variants

pytestmark = pytest.mark.unit

KINDS = {
    (90, GEMM, 8, True, False), (90, GEMM, 64, True, False), (80, GEMM, 16, True, True), (90, GEMV, 1, True, True),
    (90, WRITE, 0, False, True),
}  # fmt: skip
"""Architecture, kernel, rows of x in a tile, split K, tails."""
RUN_HERE = [
    v
    for v in variants()
    if v.dtype == "bf16" and v.tile.rows_n in (128, 64) and v.group_size == 128 and not v.adds
    if (v.arch, v.kernel, v.tile.rows_m, v.split, v.tails) in KINDS
    if v.kernel == WRITE or v.tile.rows_n == 128
]
"""Every width in five ways; `python -m tests.kernels.ptx` runs the whole static table."""
OTHERS = ("sm_90 w2g128 bf16 gemm m128", "sm_80 w3g128 fp16 gemm m64", "sm_90 w4g-1 bf16 gemm m8")
RUN_HERE += [v for v in variants() if v.name in OTHERS]


@pytest.mark.parametrize("variant", RUN_HERE, ids=lambda v: v.name)
def test_compiled_kernel_is_right(variant: Variant) -> None:
    """In two orders, with asynchronous work done at once and as late as it may be: the same bits, close to float64."""
    arguments = cases.case(variant)
    late, early = (cases.run(*arguments, seed=seed, late=seed == 1) for seed in (1, 2))
    assert torch.equal(late.y.view(torch.int16), early.y.view(torch.int16))
    assert relative_error(late.y, late.expected) < (3e-3 if variant.dtype == "bf16" else 4e-4)
    # The next launch finds its counters at a multiple of what a launch adds.
    if variant.split:
        assert set(late.rounds) == {cases.ROUNDS + 1}
    # No access of shared memory waits for another's bank, and whole sectors move, but at the edges of tails.
    assert all(late.shared.ratio(kind) <= 1.05 for kind in late.shared.cost)
    assert variant.tails or all(late.memory.ratio(kind) == 1 for kind in late.memory.cost)


def test_partial_sums_are_added_in_order() -> None:
    """By the kernel of a second launch: the bits that adding in fp32, first to last, gives."""
    variant = next(v for v in variants() if v.adds and v.arch == 90 and v.tile.rows_m == 8)
    result = cases.run_sum(variant, 19, 300, 4, seed=0)
    assert torch.equal(result.y, result.expected.to(result.y.dtype))


@pytest.mark.parametrize("damage", [r"cp\.async\.wait_group[^;]*;", r"wgmma\.wait_group[^;]*;", r"bar\.sync[^;]*;"])
def test_what_keeps_order_is_needed(damage: str) -> None:
    """Without the waits, or the barriers, of the compiled kernel the result is wrong: they would be missed."""
    variant = next(v for v in RUN_HERE if v.arch == 90 and v.bits == 4 and v.kernel == GEMM)
    arguments = cases.case(variant)
    results = [
        cases.run(*arguments, seed=seed, late=True, edit=lambda ptx: re.sub(damage, "", ptx)) for seed in range(3)
    ]
    assert not all(relative_error(r.y, r.expected) < 3e-3 for r in results)


@pytest.mark.parametrize(("bits", "dtype"), list(product(ALLOWED_BITS, ("bf16", "fp16"))))
def test_extreme_scales_give_the_weight_of_a_dense_layer(bits: int, dtype: str) -> None:
    """Subnormal scales, and the largest that are allowed: one rounding of (q - zero) * scale, bit for bit."""
    half = cases.TYPES[dtype]
    smallest, largest = (-133, 121) if dtype == "bf16" else (-24, 7)
    exponents = torch.arange(64).float() * (largest - smallest) / 64 + smallest
    scales = torch.exp2(exponents.double().round()).to(half)[:, None].expand(64, 4).clone()
    scales[:, 1:] *= 1 + torch.arange(1, 4).to(half) * 0.25
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, (64, 512), generator=generator)
    zeros = torch.randint(0, 2**bits, (64, 4), generator=generator)
    weight = PackedWeight.from_codes(codes, scales, zeros, Scheme(bits, 128, False))
    variant = next(
        v for v in variants() if v.kernel == WRITE and (v.bits, v.dtype, v.arch, v.tails) == (bits, dtype, 90, False)
    )
    result = cases.run(variant, weight, 1, 1, seed=0, late=False)
    expected = floats.to_half(result.expected.numpy(), dtype == "bf16")
    got = result.y.view(torch.int16).numpy().view(np.uint16)
    different = got != expected
    # But for the sign of zero.
    assert not ((got | expected)[different] & 0x7FFF).any()


def test_bf16_is_rounded_as_torch_rounds() -> None:
    bits = torch.randint(-(2**31), 2**31, (100_000,), generator=torch.Generator().manual_seed(0), dtype=torch.int64)
    values = bits.to(torch.int32).view(torch.float32)
    values = torch.cat(
        [values, torch.tensor([0.0, -0.0, float("inf"), 1 + 2**-8, 1 + 3 * 2**-8, 2.0**-134, 3e38, 3.4e38])]
    )
    expected = values.to(torch.bfloat16)
    finite = ~values.isnan()
    got = torch.from_numpy(floats.to_bf16(values.double().numpy()).view(np.int16)).view(torch.bfloat16)
    assert torch.equal(got[finite].view(torch.int16), expected[finite].view(torch.int16))
    assert got[~finite].isnan().all()
    # Rounded to fp32 first, this would become a tie and be rounded once more.
    assert floats.to_bf16(np.array([1 + 2.0**-8 + 2.0**-40]))[0] == 0x3F81


HEAD = ".visible .entry k(.param .u64 k_param_0, .param .u64 k_param_1)\n{ .reg .b32 %r<9>; "
LANE = "mov.u32 %r1, %tid.x; ld.param.b64 %rd1, [k_param_0]; mov.b32 %r8, global_smem; "


def launch(
    body: str, words: int = 64, warps: int = 1, late: bool = True, seed: int = 0
) -> tuple[list[int], Traffic, Traffic]:
    """Runs statements on an array of zeros; its contents afterwards, and what global and shared memory had to do."""
    data = np.zeros(words, np.uint32)
    found = Launch(parse(f"{HEAD}{LANE}{body} ret; }}"), warps, 4096)
    shared = found.run((1, 1, 1), [found.memory.add(data)], seed, late)
    return data.tolist(), found.memory.traffic, shared.traffic


STORE = "mad.wide.u32 %rd2, %r1, 4, %rd1; st.global.b32 [%rd2], %r5; "


def test_statements() -> None:
    """One of each kind, on numbers that tell them apart."""
    body = """mov.b32 %r2, 0x80402010; bfe.s32 %r3, %r2, 28, 4; bfe.u32 %r4, %r2, 28, 4; add.s32 %r5, %r3, %r4;
        { .reg .b32 a; prmt.b32 a, %r2, 7, 0x0415; lop3.b32 a, a, 0xFF00FF, 1, 0xEA; add.s32 %r5, %r5, a; }
        setp.lt.s32 %p1, %r1, 3; @%p1 add.s32 %r5, %r5, 0x1000000; @!%p1 shl.b32 %r5, %r5, 32; """
    data, *_ = launch(body + STORE)
    permuted = 0x10072000 & 0xFF00FF | 1
    assert data[:3] == [(-8 + 8 + permuted + 0x1000000)] * 3
    assert not any(data[3:])


@pytest.mark.parametrize(("address", "message"), [("%r1, 8", "outside"), ("%r1, 2", "not aligned")])
def test_access_outside_or_not_aligned_is_refused(address: str, message: str) -> None:
    with pytest.raises(IndexError, match=message):
        launch(f"mov.b32 %r5, 1; mad.wide.u32 %rd2, {address}, %rd1; st.global.b32 [%rd2], %r5; ", words=32)


@pytest.mark.parametrize(("stride", "turns"), [(4, 1), (8, 2), (128, 32), (0, 1)])
def test_bank_conflicts_are_counted(stride: int, turns: int) -> None:
    *_, shared = launch(f"mad.lo.s32 %r2, %r1, {stride}, %r8; ld.shared.b32 %r5, [%r2]; ")
    assert shared.cost["load"] == turns


def test_sectors_are_counted() -> None:
    _, memory, _ = launch("mad.wide.u32 %rd2, %r1, 32, %rd1; ld.global.b32 %r5, [%rd2]; ", words=256)
    assert memory.cost["load"] == 32
    assert memory.least["load"] == 4


COPY = "mad.lo.s32 %r2, %r1, 4, %r8; mad.wide.u32 %rd2, %r1, 4, %rd1; mov.b32 %r6, 4; "
COPY += "cp.async.ca.shared.global [ %r2 + 0 ], [ %rd2 + 0 ], 0x4, %r6; cp.async.commit_group; "


@pytest.mark.parametrize(("wait", "late", "word"), [("0", True, 0), ("1", True, 2**32 - 1), ("1", False, 0)])
def test_copies_arrive_when_they_are_waited_for(wait: str, late: bool, word: int) -> None:
    data, *_ = launch(COPY + f"cp.async.wait_group {wait}; ld.shared.b32 %r5, [%r2]; " + STORE, late=late)
    assert set(data[:32]) == {word}


@pytest.mark.parametrize("barrier", ["bar.sync 0; ", ""])
def test_warps_run_in_any_order_between_barriers(barrier: str) -> None:
    """Each lane reads what the other warp wrote."""
    body = "mad.lo.s32 %r2, %r1, 4, %r8; st.shared.b32 [%r2], %r1; xor.b32 %r3, %r1, 32; mad.lo.s32 %r3, %r3, 4, %r8; "
    found = [launch(f"{body}{barrier}ld.shared.b32 %r5, [%r3]; {STORE}", warps=2, seed=s)[0] for s in range(4)]
    right = [lane ^ 32 for lane in range(64)]
    assert all(f == right for f in found) if barrier else right not in found
    assert SHARED_START % 1024 == 0


@pytest.mark.parametrize("statement", ["mul.hi.u32 %r5, %r1, %r1;", "bar.warp.sync -1;", "cvt.rz.bf16.f32 %rs1, %r1;"])
def test_what_is_not_modelled_is_refused(statement: str) -> None:
    with pytest.raises(NotModelledError):
        launch(statement)
