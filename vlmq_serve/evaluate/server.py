"""A `vllm serve` process on a free loopback port, started, watched and always stopped."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from vlmq_serve.format.errors import VLMQError

STOP_GRACE_S = 20


@dataclass(frozen=True)
class Server:
    """A running server. `base_url` is what an OpenAI client takes; `log` holds what the server printed."""

    base_url: str
    model: str
    log: Path
    startup_s: float
    pid: int


def free_port() -> int:
    """A TCP port that is free on the loopback interface now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def find_vllm() -> str:
    """Path of the `vllm` command, beside this interpreter or on PATH; `VLMQError` when there is none."""
    beside = Path(sys.executable).with_name("vllm")
    found = str(beside) if beside.exists() else shutil.which("vllm")
    if found is None:
        raise VLMQError("vllm: command not found; install vllm (`make setup`, or pip install vlmq-serve[cuda])")
    return found


@contextlib.contextmanager
def serve(
    checkpoint: Path,
    log: Path,
    *,
    arguments: Sequence[str] = (),
    timeout_s: float = 600,
    on_wait: Callable[[float, str], None] | None = None,
) -> Iterator[Server]:
    """Run `vllm serve CHECKPOINT` and yield once it is healthy; the process group is stopped whatever happens.

    `on_wait(seconds, last_log_line)` is called about once a second until then. Raises `VLMQError` when the server
    ends early or is not ready after `timeout_s`, with the end of its log.
    """
    port = free_port()
    name = Path(os.path.abspath(checkpoint)).name  # `.` has none
    command = [find_vllm(), "serve", str(checkpoint), "--host", "127.0.0.1", "--port", str(port)]
    command += ["--served-model-name", name, *arguments]
    start = time.monotonic()
    with log.open("wb") as sink:
        # A session of its own, so that the workers that vLLM spawns are stopped with it.
        process = subprocess.Popen(
            command, stdout=sink, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True
        )
    try:
        _wait_until_healthy(process, port, log, start, timeout_s, on_wait)
        yield Server(f"http://127.0.0.1:{port}/v1", name, log, time.monotonic() - start, process.pid)
    finally:
        _stop(process)


def _wait_until_healthy(
    process: "subprocess.Popen[bytes]",
    port: int,
    log: Path,
    start: float,
    timeout_s: float,
    on_wait: Callable[[float, str], None] | None,
) -> None:
    while not _healthy(port):
        waited = time.monotonic() - start
        if process.poll() is not None:
            raise VLMQError(f"vllm serve ended with status {process.returncode}; {log} ends with:\n{_tail(log, 30)}")
        if waited > timeout_s:
            raise VLMQError(f"vllm serve is not ready after {timeout_s:.0f} s; {log} ends with:\n{_tail(log, 30)}")
        if on_wait is not None:
            on_wait(waited, _tail(log, 1))
        time.sleep(1)


def _healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2) as reply:
            return bool(reply.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _tail(log: Path, lines: int) -> str:
    text = log.read_text(encoding="utf-8", errors="replace").strip()
    return "\n".join(text.splitlines()[-lines:])


def _stop(process: "subprocess.Popen[bytes]") -> None:
    """Ask the whole process group to end, then kill what is left of it."""
    for sign, grace in ((signal.SIGTERM, STOP_GRACE_S), (signal.SIGKILL, STOP_GRACE_S)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, sign)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(grace)
            if not _group_alive(process.pid):
                return


def _group_alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
