"""Memory and processor time of a server: all its processes, sampled while it works."""

import subprocess
import threading
import time
from collections.abc import Collection
from dataclasses import dataclass
from types import TracebackType

MIB = 2**20


@dataclass(frozen=True)
class Sample:
    """MiB now: all processes of a tree, the largest of them alone (the worker with the weights), and on NVIDIA GPUs.

    processor_s: what all of them have computed so far, in seconds of one core.
    """

    processes_mib: float
    largest_mib: float
    device_mib: float
    processor_s: float


def sample(pid: int) -> Sample:
    """Memory of `pid` and all processes below it; proportional set sizes, so that shared memory counts once."""
    import psutil

    sizes = {}
    seconds = 0.0
    try:
        root = psutil.Process(pid)
        for process in (root, *root.children(recursive=True)):
            try:
                sizes[process.pid] = process.memory_full_info().pss / MIB
                seconds += sum(process.cpu_times()[:2])
            except psutil.Error:
                continue
    except psutil.Error:
        pass
    total, largest = round(sum(sizes.values()), 1), round(max(sizes.values(), default=0.0), 1)
    return Sample(total, largest, device_memory(sizes), seconds)


def device_memory(pids: Collection[int]) -> float:
    """MiB of these processes on all NVIDIA GPUs; 0 where there are none.

    Where the driver cannot name processes, as in some containers: what everybody uses.
    """
    apps = _ask_driver("--query-compute-apps=pid,used_memory")
    own = [float(memory) for pid, memory in apps if pid.isdigit() and int(pid) in pids and memory.isdigit()]
    return sum(own) if own else sum(float(memory) for (memory,) in _ask_driver("--query-gpu=memory.used"))


def _ask_driver(query: str) -> list[list[str]]:
    try:
        done = subprocess.run(
            ["nvidia-smi", query, "--format=csv,noheader,nounits"], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    lines = done.stdout.splitlines() if done.returncode == 0 else []
    return [[part.strip() for part in line.split(",")] for line in lines if line.strip()]


class MemoryWatch:
    """Highest memory of a process tree and of its share of the GPUs while the block runs."""

    def __init__(self, pid: int, interval_s: float = 1.0) -> None:
        self.peak_mib = 0.0
        self.peak_device_mib = 0.0
        self._pid = pid
        self._interval_s = interval_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "MemoryWatch":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.is_set():
            started = time.monotonic()
            now = sample(self._pid)
            self.peak_mib = max(self.peak_mib, now.processes_mib)
            self.peak_device_mib = max(self.peak_device_mib, now.device_mib)
            self._stop.wait(max(0.0, self._interval_s - (time.monotonic() - started)))
