"""`examples/ask.py` where nothing can be asked: one line on stderr and exit status 1."""

import json
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest

ASK = Path(__file__).resolve().parents[2] / "examples" / "ask.py"
NOWHERE = "http://127.0.0.1:9/v1"  # the discard port, where nothing listens


def ask(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ASK), *(str(argument) for argument in arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "a.png"
    path.write_bytes(b"a picture to this test")
    return path


def test_a_missing_picture(tmp_path: Path) -> None:
    result = ask(NOWHERE, tmp_path / "none.png", "What?")
    assert (result.returncode, result.stderr) == (
        1,
        f"error: {tmp_path}/none.png cannot be read (No such file or directory)\n",
    )


def test_a_server_that_is_not_there(picture: Path) -> None:
    result = ask(NOWHERE, picture, "What?")
    assert (result.returncode, result.stderr) == (1, f"error: no server answers at {NOWHERE}\n")


def test_a_server_that_refuses(picture: Path) -> None:
    class Refusing(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = json.dumps({"error": {"message": "not\nfor you"}}).encode()
            self.send_response(401)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Silent."""

    with HTTPServer(("127.0.0.1", 0), Refusing) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        result = ask(f"http://127.0.0.1:{server.server_port}/v1", picture, "What?")
        server.shutdown()
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert "refuses the request" in line
