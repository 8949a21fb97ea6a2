"""What the compiler makes of the Triton kernel, held against the committed table. Needs no GPU.

The table is written by `python benchmarks/kernels/static_table.py`, which compiles every variant; here a few are
compiled again and none may be worse than its row.
"""

import csv
import warnings
from pathlib import Path

import pytest

pytest.importorskip("triton")

import triton

from vlmq_serve.kernels.compile_report import Variant, compile_variant, kernel_version, variants
from vlmq_serve.kernels.tiles import SHARED_MEMORY, SHARED_MEMORY_ELSEWHERE

pytestmark = pytest.mark.unit

TABLE = Path(__file__).with_name("static_table.csv")
COST = ("registers", "stack_bytes", "shared_bytes", "spill_instructions", "instructions", "conversions")
INSTRUCTION_BUDGET = {2: 2.6, 3: 3.0, 4: 2.8}
"""Instructions per weight in the main loop on sm_90 up to M = 16, group 128."""
COMPILED_HERE = [
    v
    for v in variants()
    if v.group_size == 128 and v.zeros and not v.tails
    if (v.arch, v.dtype, v.tile.rows_m) in {(90, "bf16", 8), (90, "bf16", 0), (80, "fp16", 64)}
]


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
    if variant.arch == 90 and variant.multiplies:
        assert row["matrix"] == "HGMMA"
        assert row["weights_in_registers"] == "True"
        if variant.tile.rows_m <= 16 and variant.group_size == 128 and not variant.tails:
            assert float(row["instructions"]) <= INSTRUCTION_BUDGET[variant.bits]


def test_the_cases_compiled_here_span_widths_and_architectures() -> None:
    assert {(v.bits, v.arch) for v in COMPILED_HERE} == {(b, a) for b in (2, 3, 4) for a in (80, 90)}


@pytest.mark.parametrize("variant", COMPILED_HERE, ids=lambda v: v.name)
def test_compiles_no_worse_than_its_row(variant: Variant) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = compile_variant(variant)
    assert report.fault(variant.arch) is None
    row = table()[variant.name]
    if row["triton"] != triton.__version__:
        pytest.skip(f"the table was made with Triton {row['triton']}")
    worse = {c: (getattr(report, c), row[c]) for c in COST if getattr(report, c) > float(row[c])}
    assert not worse, worse
