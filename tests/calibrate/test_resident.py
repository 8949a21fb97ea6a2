"""The peak is this program's: neither that of whoever started it nor what it holds now."""

import subprocess
import sys

_CHILD = """
from vlmq_serve.calibrate.resident import peak_resident_mib
before = peak_resident_mib()
held = bytearray(200 * 2**20)
del held
print(before, peak_resident_mib())
"""


def test_a_child_does_not_begin_with_its_parent_s_peak() -> None:
    held = bytearray(500 * 2**20)
    done = subprocess.run([sys.executable, "-c", _CHILD], capture_output=True, text=True, check=True)
    before, after = map(float, done.stdout.split())
    assert before < 200 < len(held) / 2**20
    assert 190 < after - before < 260
