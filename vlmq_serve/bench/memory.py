"""Memory of a server: all its processes, sampled while it works."""

import subprocess
import threading
import time
from types import TracebackType

MIB = 2**20


def process_memory(pid: int) -> tuple[float, float]:
    """MiB of `pid` and all processes below it, and of the largest of them alone (the worker that holds the weights).

    Proportional set size, so that memory that processes share counts once.
    """
    import psutil

    sizes = [0.0]
    try:
        root = psutil.Process(pid)
        for process in (root, *root.children(recursive=True)):
            try:
                sizes.append(process.memory_full_info().pss / MIB)
            except psutil.Error:
                continue
    except psutil.Error:
        pass
    return sum(sizes), max(sizes)


def device_memory() -> float:
    """MiB in use on all NVIDIA GPUs; 0 where there are none."""
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return 0.0
    numbers = [line for line in done.stdout.split() if line.isdigit()]
    return float(sum(map(int, numbers)))


class MemoryWatch:
    """Highest memory of a process tree and of the GPUs while the block runs."""

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
        self._sample()

    def _watch(self) -> None:
        while not self._stop.is_set():
            started = time.monotonic()
            self._sample()
            self._stop.wait(max(0.0, self._interval_s - (time.monotonic() - started)))

    def _sample(self) -> None:
        self.peak_mib = max(self.peak_mib, process_memory(self._pid)[0])
        self.peak_device_mib = max(self.peak_device_mib, device_memory())
