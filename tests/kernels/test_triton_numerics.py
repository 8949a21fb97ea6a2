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
    bits: int, dtype: str, group: int, symmetric: bool, m: int, n: int, k: int, split: int = 1,
    path: str = "triton", scratch: int = 0, order: int = 0, identity: bool = False,
) -> dict[str, object]:  # fmt: skip
    """`scratch` bounds the bytes of dequantized weight, 0 leaves the bound as it is; `order` is the seed of the order
    in which programs run, 0 the interpreter's own; with `identity` x is the unit matrix, so that y is the weight, which
    has every code in every row and as many zeros as rows."""
    name = f"{path}-w{bits}g{group}{'s' if symmetric else ''}-{dtype}-m{m}-n{n}-k{k}-split{split}-scratch{scratch}"
    name += f"-order{order}" if order else ""
    name += "-identity" if identity else ""
    return {"id": name, "bits": bits, "dtype": dtype, "group": group, "symmetric": symmetric,
            "m": m, "n": n, "k": k, "split": split, "path": path, "scratch": scratch, "order": order,
            "identity": identity}  # fmt: skip


CASES = [
    # Every width, type and group, with zeros and symmetric, at a tail of N.
    *(
        case(bits, dtype, group, symmetric, 5, 72, 512)
        for bits in (2, 3, 4, 8)
        for dtype in ("bfloat16", "float16")
        for group, symmetric in ((32, False), (64, True), (128, False), (128, True), (-1, False))
    ),
    # Every bucket of M and its edges; M above the largest tile.
    *(case(bits, "bfloat16", 64, False, m, 40, 256) for bits in (2, 3, 4, 8) for m in (0, 1, 8, 9, 33, 65, 130)),
    # K that no slab divides (padded), several tiles of N, K split over programs of their own.
    *(case(bits, "float16", 32, False, 3, 136, k) for bits in (2, 3, 4, 8) for k in (96, 288)),
    *(case(bits, "bfloat16", -1, True, 2, 16, 288) for bits in (2, 3, 4, 8)),
    *(case(bits, dtype, 128, False, 9, 130, 1536, 4) for bits in (2, 3, 4, 8) for dtype in ("bfloat16", "float16")),
    *(case(bits, "bfloat16", 32, False, 20, 24, 800, 8) for bits in (2, 3, 4, 8)),
    # The last M of the fused kernel and the first of the dense one, and a long prompt.
    *(case(bits, "bfloat16", 64, False, m, 24, 320) for bits in (2, 3, 4, 8) for m in (512, 513)),
    *(case(bits, "bfloat16", 128, False, 16384, 40, 256) for bits in (2, 3, 4, 8)),
    # Dequantized weights: every type and group, tails of N and K, several parts of which the last is short.
    *(
        case(bits, dtype, group, symmetric, 3, 72, 480, path="triton_dense")
        for bits in (2, 3, 4, 8)
        for dtype in ("bfloat16", "float16")
        for group, symmetric in ((32, False), (-1, True))
    ),
    *(case(bits, "bfloat16", g, False, 5, 300, 512, path="triton_dense") for bits in (2, 3, 4, 8) for g in (64, 128)),
    *(case(bits, "float16", 64, False, 4, 300, 320, path="triton_dense", scratch=1) for bits in (2, 3, 4, 8)),
    case(4, "bfloat16", 64, False, 600, 24, 128, path="triton_fused"),
    # One and two rows without matrix instructions; above two rows the path is the usual one.
    *(
        case(bits, dtype, group, symmetric, m, 72, k, path="triton_gemv")
        for bits in (2, 3, 4, 8)
        for dtype in ("bfloat16", "float16")
        for group, symmetric, m, k in (
            (128, False, 1, 512),
            (32, True, 2, 288),
            (-1, False, 2, 512),
            (64, False, 3, 64),
        )
    ),
]
SUMS = [
    # A split K whose sums the last program adds, in the order of arrival of three seeds, or a second launch.
    [
        case(bits, dtype, 128, False, m, 300, 1536, 4, path, 0, order)
        for path, order in ((f"triton{kind}", 0), (f"triton{kind}", 1), (f"triton{kind}", 2), (f"triton{last}", 0))
    ]
    for bits in (2, 3, 4, 8)
    for dtype, m, kind, last in (
        ("bfloat16", 9, "", "_second_launch"), ("float16", 3, "", "_second_launch"), ("bfloat16", 2, "_gemv", "_gemv"),
        ("bfloat16", 140, "", "_second_launch"),
    )
]  # fmt: skip
EXACT = [
    case(bits, dtype, -1, False, 256, 2**bits, 256, path=path, identity=True)
    for bits in (2, 3, 4, 8)
    for dtype in ("bfloat16", "float16")
    for path in ("triton_fused", "triton_dense")
]
EVERY = list({str(c["id"]): c for c in [*CASES, *EXACT, *(c for group in SUMS for c in group)]}.values())


@pytest.fixture(scope="module")
def results() -> dict[str, dict[str, object]]:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", ""))),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(RUNNER)], input=json.dumps(EVERY), env=environment, capture_output=True,
        text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, dict[str, object]] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("wanted", EVERY, ids=lambda c: str(c["id"]))
def test_matches_float64(wanted: dict[str, object], results: dict[str, dict[str, object]]) -> None:
    got = results[str(wanted["id"])]
    assert got["shape"] == [wanted["m"], wanted["n"]]
    assert got["dtype"] == f"torch.{wanted['dtype']}"
    error, plain = float(str(got["error"])), float(str(got["plain"]))
    assert error <= {"bfloat16": 5e-3, "float16": 1e-3}[str(wanted["dtype"])]
    # The weights that the kernel multiplies with are those of a dense 16-bit layer.
    assert error <= 1.1 * plain + 1e-7


@pytest.mark.parametrize("wanted", EXACT, ids=lambda c: str(c["id"]))
def test_every_code_and_zero_give_the_weight_of_a_dense_layer(
    wanted: dict[str, object], results: dict[str, dict[str, object]]
) -> None:
    """Bit for bit."""
    assert results[str(wanted["id"])]["same_bits"]


@pytest.mark.parametrize("group", SUMS, ids=lambda group: str(group[0]["id"]))
def test_who_adds_and_who_arrives_last_changes_no_bit(
    group: list[dict[str, object]], results: dict[str, dict[str, object]]
) -> None:
    assert len({results[str(c["id"])]["digest"] for c in group}) == 1


def test_counters_are_ready_for_the_next_product(results: dict[str, dict[str, object]]) -> None:
    assert all(result["settled"] for result in results.values())
