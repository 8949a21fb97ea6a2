"""Questions to a server: what it refuses is one error that names the line."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace
from typing import Any

import httpx
import openai
import pytest

from vlmq_serve.calibrate.chats import read_chats
from vlmq_serve.evaluate.endpoint import API_KEY, answer_remotely, ask
from vlmq_serve.format.errors import VLMQError


def test_a_refused_question_is_named(tmp_path):
    messages = [{"role": "user", "content": "Colour?"}, {"role": "assistant", "content": "red"}]
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": messages}))

    def refuse(**_: Any) -> None:
        response = httpx.Response(400, request=httpx.Request("POST", "http://localhost/v1/chat/completions"))
        raise openai.BadRequestError("Failed to apply\nthe processor", response=response, body=None)

    client = SimpleNamespace(chat=SimpleNamespace(completions=SimpleNamespace(create=refuse)))
    with pytest.raises(VLMQError, match=r"line 1: no answer from the server \(Failed to apply the processor\)"):
        ask(client, "model", read_chats(tmp_path / "chats.jsonl")[0])


class Guarded(BaseHTTPRequestHandler):
    """As `vllm serve --api-key secret`, but that it repeats a wrong key in its answer, as some servers do."""

    page = b""
    """What is answered in place of all else."""

    def do_GET(self) -> None:
        self.reply({"object": "list", "data": [{"id": "model", "object": "model", "created": 0, "owned_by": "us"}]})

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        message = {"role": "assistant", "content": " red "}
        self.reply({"id": "1", "object": "chat.completion", "created": 0, "model": "model",
                    "choices": [{"index": 0, "finish_reason": "stop", "message": message}]})  # fmt: skip

    def reply(self, content: dict[str, Any]) -> None:
        given = self.headers["Authorization"]
        allowed = given == "Bearer secret"
        body = self.page or json.dumps(content if allowed else {"error": f"got {given}"}).encode()
        self.send_response(200 if allowed else 401)
        self.send_header("Content-Type", "text/html" if self.page else "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def guarded() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), Guarded)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    thread.join()
    server.server_close()


def test_the_key_comes_from_the_environment_and_is_never_repeated(tmp_path, monkeypatch, guarded):
    messages = [{"role": "user", "content": "Colour?"}, {"role": "assistant", "content": "red"}]
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": messages}))
    chats = read_chats(tmp_path / "chats.jsonl")
    monkeypatch.setenv(API_KEY, "secret")
    assert list(answer_remotely(guarded, chats)) == ["red"]
    monkeypatch.delenv(API_KEY)
    with pytest.raises(VLMQError, match=r"/v1: the server asks for its API key \(401\).* OPENAI_API_KEY is not set"):
        list(answer_remotely(guarded, chats))
    monkeypatch.setenv(API_KEY, "not-this-one")
    with pytest.raises(VLMQError, match="OPENAI_API_KEY holds another") as refused:
        list(answer_remotely(guarded, chats))
    assert "not-this-one" not in str(refused.value)
    client = openai.OpenAI(base_url=guarded, api_key="not-this-one", max_retries=0)
    with pytest.raises(VLMQError, match=r"line 1: the server asks for its API key") as refused:
        ask(client, "model", chats[0])
    assert "not-this-one" not in str(refused.value)


def test_a_web_page_is_no_answer(tmp_path, monkeypatch, guarded):
    """The port of a web interface, or a proxy that asks to log in."""
    messages = [{"role": "user", "content": "Colour?"}, {"role": "assistant", "content": "red"}]
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": messages}))
    chats = read_chats(tmp_path / "chats.jsonl")
    monkeypatch.setenv(API_KEY, "secret")
    monkeypatch.setattr(Guarded, "page", b"<html>Log in</html>")
    with pytest.raises(VLMQError, match=r"/v1: no OpenAI-compatible answer \(it is no JSON\); .* end in /v1"):
        list(answer_remotely(guarded, chats))
    client = openai.OpenAI(base_url=guarded, api_key="secret", max_retries=0)
    with pytest.raises(VLMQError, match=r"line 1: no answer from the server \(got .* which has no choices\)"):
        ask(client, "model", chats[0])
