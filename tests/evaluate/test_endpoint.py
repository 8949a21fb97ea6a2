"""Questions to a server: what it refuses is one error that names the line."""

import json
from types import SimpleNamespace
from typing import Any

import httpx
import openai
import pytest

from vlmq_serve.calibrate.chats import read_chats
from vlmq_serve.evaluate.endpoint import ask
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
