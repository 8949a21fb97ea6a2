"""What the compiler makes of the Triton kernel, held against the committed table. Needs no GPU.

The table is written by `python benchmarks/kernels/static_table.py`, which compiles every variant; here a few are
compiled again and none may be worse than its row.
"""

import csv
import warnings
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("triton")

import triton

from vlmq_serve.format.scheme import ALLOWED_BITS
from vlmq_serve.kernels.compile_report import (
    GEMM,
    GEMV,
    WRITE,
    Variant,
    compile_variant,
    kernel_version,
    publishes_in_order,
    variants,
    worse,
)
from vlmq_serve.kernels.tiles import SHARED_MEMORY, SHARED_MEMORY_ELSEWHERE

pytestmark = pytest.mark.unit

TABLE = Path(__file__).with_name("static_table.csv")
INSTRUCTION_BUDGET = {2: 2.6, 3: 3.0, 4: 2.8, 8: 2.8}
"""Instructions per weight in the main loop on sm_90 up to M = 16, group 128, with and without a split K."""
GEMV_BUDGET = {2: 3.6, 3: 4.2, 4: 3.8, 8: 4.8}
"""The same for one row without matrix instructions."""
COMPILED_HERE = [
    v
    for v in variants()
    if v.group_size == 128 and not v.tails
    if (v.arch, v.dtype, v.kernel, v.tile.rows_m, v.split)
    in {
        (90, "bf16", GEMM, 8, True),
        (90, "fp16", GEMV, 1, False),
        (80, "fp16", GEMM, 64, False),
        (90, "bf16", WRITE, 0, False),
    }
]
"""One of each kind at every width, 16 rows of the table, so that the tests stay short; `static_table.py --check`
compiles them all, in a few minutes."""


def table() -> dict[str, dict[str, str]]:
    with TABLE.open() as file:
        return {row["name"]: row for row in csv.DictReader(file)}


def test_table_is_complete_and_of_this_kernel() -> None:
    rows = table()
    assert set(rows) == {v.name for v in variants()}
    if {row["triton"] for row in rows.values()} == {triton.__version__}:
        assert {row["kernel"] for row in rows.values()} == {kernel_version()}, (
            "the kernel changed: run python benchmarks/kernels/static_table.py and look at what got worse"
        )


@pytest.mark.parametrize("variant", list(variants()), ids=lambda v: v.name)
def test_row_keeps_the_limits(variant: Variant) -> None:
    row = table()[variant.name]
    assert int(row["stack_bytes"]) == 0
    assert int(row["spill_instructions"]) == 0
    assert int(row["shared_bytes"]) <= SHARED_MEMORY.get(variant.arch, SHARED_MEMORY_ELSEWHERE)
    assert float(row["conversions"]) <= 0.01
    assert row["ordered"] == "True"
    few_rows_of_large_groups = variant.tile.rows_m <= 16 and variant.group_size == 128
    if variant.kernel in (GEMM, GEMV):
        # Nothing waits for memory where it is needed, and codes come 16 bytes at a time.
        assert int(row["plain_loads"]) == 0
        assert float(row["wide_loads"]) >= 0.4
    if variant.kernel == GEMM:
        assert row["matrix"] == ("HGMMA" if variant.arch == 90 else "HMMA")
    if variant.kernel == GEMM and variant.arch == 90:
        assert row["weights_in_registers"] == "True"
        assert float(row["matrix_waits"]) <= 0.5
        if few_rows_of_large_groups and not variant.tails:
            assert float(row["instructions"]) <= INSTRUCTION_BUDGET[variant.bits]
    widest = variant.tile.rows_m == 1 and variant.tile.rows_n == 128
    if variant.kernel == GEMV and widest and few_rows_of_large_groups and not variant.tails:
        assert float(row["instructions"]) <= GEMV_BUDGET[variant.bits]


def test_an_unordered_publication_is_noticed() -> None:
    """Each of the five conditions, taken away from a sequence that has them all."""
    good = [
        "st.global.v4.b32 [ %rd1 + 0 ], { %r1 };", "bar.sync 0;",
        "@%p1 atom.global.gpu.acq_rel.add.u32 %r2, [ %rd2 + 0 ], %r3;", "bar.sync 0;",
        "ld.global.cg.v4.b32 { %r4 }, [ %rd1 + 0 ];",
    ]  # fmt: skip
    assert publishes_in_order("\n".join(good))
    for missing in range(len(good)):
        assert not publishes_in_order("\n".join(good[:missing] + good[missing + 1 :]))
    for weaker in ((".acq_rel", ".relaxed"), (".gpu", ".cta"), (".cg", "")):
        assert not publishes_in_order("\n".join(good).replace(*weaker))


def test_the_cases_compiled_here_span_widths_and_architectures() -> None:
    assert {(v.bits, v.arch) for v in COMPILED_HERE} == {(b, a) for b in ALLOWED_BITS for a in (80, 90)}
    assert len(COMPILED_HERE) == 16


@pytest.mark.parametrize("variant", COMPILED_HERE, ids=lambda v: v.name)
def test_compiles_no_worse_than_its_row(variant: Variant) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = compile_variant(variant)
    assert report.fault(variant.arch) is None
    row = table()[variant.name]
    if row["triton"] != triton.__version__:
        pytest.skip(f"the table was made with Triton {row['triton']}")
    assert not worse(report, row)


def test_a_worse_row_is_noticed() -> None:
    """On every column that counts."""
    variant = COMPILED_HERE[0]
    row = table()[variant.name]
    report = compile_variant(variant)
    lost = {"wide_loads": 0.1, "weights_in_registers": False, "ordered": False}
    more = {c: getattr(report, c) + 1 for c in ("registers", "shared_bytes", "instructions", "plain_loads")}
    for name, value in {**lost, **more}.items():
        assert set(worse(replace(report, **{name: value}), row)) >= {name}
