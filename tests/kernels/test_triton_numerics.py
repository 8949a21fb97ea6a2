"""The Triton kernel against float64, in Triton's interpreter (a process of its own, so that nothing leaks)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.unit
pytest.importorskip("triton")

RUNNER = Path(__file__).with_name("triton_interpreter.py")
ROOT = Path(__file__).parents[2]


def case(
    bits: int, dtype: str, group: int, symmetric: bool, m: int, n: int, k: int, split: int = 1
) -> dict[str, object]:
    name = f"w{bits}g{group}{'s' if symmetric else ''}-{dtype}-m{m}-n{n}-k{k}-split{split}"
    return {"id": name, "bits": bits, "dtype": dtype, "group": group, "symmetric": symmetric,
            "m": m, "n": n, "k": k, "split": split}  # fmt: skip


CASES = [
    # Every width, type and group, with zeros and symmetric, at a tail of N.
    *(
        case(bits, dtype, group, symmetric, 5, 72, 512)
        for bits in (2, 3, 4)
        for dtype in ("bfloat16", "float16")
        for group, symmetric in ((32, False), (64, True), (128, False), (128, True), (-1, False))
    ),
    # Every bucket of M and its edges; M above the largest tile.
    *(case(bits, "bfloat16", 64, False, m, 40, 256) for bits in (2, 3, 4) for m in (0, 1, 16, 33, 65, 130)),
    # K that no slab divides (padded), several tiles of N, K split over programs of their own.
    *(case(bits, "float16", 32, False, 3, 136, k) for bits in (2, 3, 4) for k in (96, 288)),
    *(case(bits, "bfloat16", -1, True, 2, 16, 288) for bits in (2, 3, 4)),
    *(case(bits, dtype, 128, False, 9, 130, 1536, 4) for bits in (2, 3, 4) for dtype in ("bfloat16", "float16")),
    *(case(bits, "bfloat16", 32, False, 20, 24, 800, 8) for bits in (2, 3, 4)),
]


@pytest.fixture(scope="module")
def results() -> dict[str, dict[str, object]]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(RUNNER)], input=json.dumps(CASES), env=environment, capture_output=True,
        text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, dict[str, object]] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("wanted", CASES, ids=lambda c: str(c["id"]))
def test_matches_float64(wanted: dict[str, object], results: dict[str, dict[str, object]]) -> None:
    got = results[str(wanted["id"])]
    assert got["shape"] == [wanted["m"], wanted["n"]]
    assert got["dtype"] == f"torch.{wanted['dtype']}"
    error, plain = float(str(got["error"])), float(str(got["plain"]))
    assert error <= {"bfloat16": 5e-3, "float16": 1e-3}[str(wanted["dtype"])]
    # The weights that the kernel multiplies with are those of a dense 16-bit layer, bit for bit.
    assert error <= 1.1 * plain + 1e-7
