"""`examples/ask.py` and `examples/latency.py` where nothing can be asked: one line on stderr and exit status 1."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
NOWHERE = "http://127.0.0.1:9/v1"  # the discard port, where nothing listens
MODEL = {"id": "a", "object": "model", "created": 0, "owned_by": "a"}

pytestmark = pytest.mark.parametrize("example", ["ask.py", "latency.py"])


def ask(example: str, url: str, picture: Path, key: str | None = None) -> subprocess.CompletedProcess[str]:
    ordered = (picture, "What?") if example == "ask.py" else ("What?", picture)
    command = [sys.executable, str(EXAMPLES / example), url, *map(str, ordered)]
    environment = {name: value for name, value in os.environ.items() if name != "OPENAI_API_KEY"}
    environment |= {} if key is None else {"OPENAI_API_KEY": key}
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)


class Handler(BaseHTTPRequestHandler):
    """Names its models to whoever knows the key, and ends within the first answer."""

    key = "none"
    models = (MODEL,)

    def do_GET(self) -> None:
        known = self.headers["Authorization"] == f"Bearer {self.key}"
        answer = {"object": "list", "data": self.models} if known else {"error": {"message": "not\nfor you"}}
        body = json.dumps(answer).encode()
        self.send_response(200 if known else 401)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Content-Length", "1000")
        self.end_headers()
        self.wfile.write(b"data: {")

    def log_message(self, *_: object) -> None:
        """Silent."""


@contextmanager
def serving(**kind: object) -> Iterator[str]:
    """The URL of a server with this `key` or these `models`."""
    with HTTPServer(("127.0.0.1", 0), type("Kind", (Handler,), kind)) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/v1"
        server.shutdown()


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "a.png"
    path.write_bytes(b"a picture to this test")
    return path


def test_a_missing_picture(example: str, tmp_path: Path) -> None:
    result = ask(example, NOWHERE, tmp_path / "none.png")
    assert (result.returncode, result.stderr) == (
        1,
        f"error: {tmp_path}/none.png cannot be read (No such file or directory)\n",
    )


def test_a_server_that_is_not_there(example: str, picture: Path) -> None:
    result = ask(example, NOWHERE, picture)
    assert (result.returncode, result.stderr) == (1, f"error: no server answers at {NOWHERE}\n")


def test_a_server_that_refuses(example: str, picture: Path) -> None:
    with serving(key="secret") as url:
        result = ask(example, url, picture)
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert "refuses the request" in line


def test_a_server_without_a_model(example: str, picture: Path) -> None:
    with serving(models=()) as url:
        result = ask(example, url, picture)
    assert (result.returncode, result.stderr) == (1, f"error: {url} serves no model\n")


@pytest.mark.parametrize(("given", "sent"), [("secret", "secret"), (None, "none"), ("", "none")])
def test_the_key_is_that_of_the_environment(example: str, given: str | None, sent: str, picture: Path) -> None:
    """With it the server is asked on, and ends within its answer; without it the server would refuse."""
    with serving(key=sent) as url:
        result = ask(example, url, picture, given)
    assert (result.returncode, result.stderr) == (1, f"error: no server answers at {url}\n")
