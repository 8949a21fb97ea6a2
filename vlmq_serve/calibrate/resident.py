"""The highest resident memory of this process."""

import resource
from pathlib import Path


def peak_resident_mib() -> float:
    """MiB so far, of this program alone.

    `ru_maxrss` would not do where there is a better count: on Linux a program that another one has started begins with
    that one's peak, so that a calibration started by a bench would be reported with the bench's models.
    """
    status = Path("/proc/self/status")
    lines = status.read_text(encoding="utf-8").splitlines() if status.exists() else []
    found = next((line.split()[1] for line in lines if line.startswith("VmHWM:")), None)
    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss if found is None else int(found)
    return kib / 1024
