"""The server process: errors carry its log, and nothing survives the block."""

import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vlmq_serve.evaluate import server
from vlmq_serve.format.errors import VLMQError

SLEEPER = """#!/bin/sh
# stands where `vllm` stands: starts a worker of its own, then waits
echo "started with $*"
sleep 300 &
echo $! > "{pid}"
wait
"""
HEALTHY = """#!{python}
import http.server, subprocess, sys
worker = subprocess.Popen(["sleep", "300"])
open("{pid}", "w").write(str(worker.pid))
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404); self.end_headers()
    def log_message(self, *args): pass
port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> Path:
    command = tmp_path / "bin" / "vllm"
    command.parent.mkdir()
    command.write_text(script.format(pid=tmp_path / "pid", python=sys.executable))
    command.chmod(command.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(server, "find_vllm", lambda: str(command))
    return tmp_path / "pid"


def alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text().split()[2]


def wait_dead(pid: int) -> bool:
    deadline = time.monotonic() + 10
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    return not alive(pid)


def test_a_server_that_ends_early_shows_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch, "#!/bin/sh\necho the reason\nexit 3\n")
    with (
        pytest.raises(VLMQError, match=r"(?s)status 3.*the reason"),
        server.serve(tmp_path / "model", tmp_path / "log", timeout_s=20),
    ):
        pass


def test_a_server_that_hangs_is_stopped_with_its_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pid_file = install(tmp_path, monkeypatch, SLEEPER)
    waits: list[str] = []
    with (
        pytest.raises(VLMQError, match="not ready after 3 s"),
        server.serve(
            tmp_path / "model", tmp_path / "log", timeout_s=3, on_wait=lambda seconds, line: waits.append(line)
        ),
    ):
        pass
    assert any("started with serve" in line for line in waits)
    assert wait_dead(int(pid_file.read_text()))


def test_the_server_is_stopped_when_the_block_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pid_file = install(tmp_path, monkeypatch, HEALTHY)

    def fail_while_it_runs() -> None:
        with server.serve(tmp_path / "model", tmp_path / "log", timeout_s=30) as running:
            assert running.base_url.startswith("http://127.0.0.1:")
            assert alive(int(pid_file.read_text()))
            raise RuntimeError("client broke")

    with pytest.raises(RuntimeError, match="client broke"):
        fail_while_it_runs()
    assert wait_dead(int(pid_file.read_text()))


def test_a_model_in_the_current_folder_has_the_name_of_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM refuses to serve a model without a name."""
    install(tmp_path, monkeypatch, HEALTHY)
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path / "model")
    with server.serve(Path(), tmp_path / "log", timeout_s=30) as running:
        assert running.model == "model"


def test_no_vllm_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(VLMQError, match="make setup"):
        server.find_vllm()


def test_free_ports_can_be_bound() -> None:
    code = "import socket, sys; socket.socket().bind(('127.0.0.1', int(sys.argv[1])))"
    subprocess.run([sys.executable, "-c", code, str(server.free_port())], check=True, env=os.environ)
