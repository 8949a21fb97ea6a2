"""vLLM's parallel linears on 1, 2, 4 and 8 ranks of one machine give the parts of the whole product."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.serve
def test_column_and_row_parallel_layers_on_1_2_4_8_ranks() -> None:
    schemes = ["w3g32", "w2g-1s"]
    command = [sys.executable, "-m", "tests.quant_methods.sharding_ranks", *schemes]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "PYTHONPATH": os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", ""))),
    }
    environment["VLMQ_KERNEL"] = "reference"  # exact in float32: what is tested is which rows and columns a rank has
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, cwd=ROOT, env=environment)
    lines = [line for line in done.stdout.splitlines() if line.startswith(tuple(schemes))]
    expected = [f"{scheme} on {ranks} ranks: right" for scheme in schemes for ranks in (1, 2, 4, 8)]
    assert lines == expected, done.stderr[-3000:]
    assert done.returncode == 0
