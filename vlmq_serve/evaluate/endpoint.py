"""Answers from an OpenAI-compatible endpoint, such as `vllm serve`."""

import base64
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from vlmq_serve.calibrate.chats import Chat
from vlmq_serve.format.errors import VLMQError

API_KEY = "OPENAI_API_KEY"
"""The environment variable that the openai package reads too; servers without a key take whatever is sent."""

_SIGNATURES = {b"\x89PNG": "png", b"\xff\xd8\xff": "jpeg", b"RIFF": "webp", b"GIF8": "gif"}


def image_url(data: bytes) -> str:
    """Encoded image bytes as a data URL."""
    kind = next((name for start, name in _SIGNATURES.items() if data.startswith(start)), "png")
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def openai_messages(chat: Chat) -> list[dict[str, Any]]:
    """The prompt of a chat in the form of the OpenAI API, images as data URLs."""
    images = iter(chat.image_bytes())
    return [{"role": message["role"], "content": _content(message["content"], images)} for message in chat.prompt]


def _content(content: Any, images: Iterator[bytes]) -> Any:
    if isinstance(content, str):
        return content
    return [
        {"type": "image_url", "image_url": {"url": image_url(next(images))}} if part["type"] == "image" else dict(part)
        for part in content
    ]


def connect(base_url: str) -> tuple[Any, str]:
    """An OpenAI client and the name of the model that the endpoint serves; `VLMQError` when nobody answers.

    The key is that of the environment variable `OPENAI_API_KEY`, for servers started with `--api-key`.
    """
    try:
        import openai
    except ImportError:
        raise VLMQError("openai: package not installed; pip install 'vlmq-serve[eval]'") from None
    client = openai.OpenAI(base_url=base_url, api_key=os.environ.get(API_KEY) or "none", timeout=300, max_retries=2)
    try:
        models = client.models.list().data
    except openai.AuthenticationError:
        raise _wrong_key(base_url) from None
    except (openai.OpenAIError, AttributeError) as error:
        # The client hands on what is no JSON, such as a web page, as a text, and then asks it for attributes.
        detail = error if isinstance(error, openai.OpenAIError) else "it is no JSON"
        raise VLMQError(
            f"{base_url}: no OpenAI-compatible answer ({detail}); is the server up, does the URL end in /v1?"
        ) from None
    if not models:
        raise VLMQError(f"{base_url}: serves no model")
    return client, models[0].id


def _wrong_key(where: str) -> VLMQError:
    """Without the server's own words, which may repeat the key."""
    state = "holds another" if os.environ.get(API_KEY) else "is not set"
    return VLMQError(f"{where}: the server asks for its API key (401); the environment variable {API_KEY} {state}")


def ask(client: Any, model: str, chat: Chat, max_new_tokens: int = 32) -> str:
    """Greedy answer to one chat; `VLMQError` with its line where the server refuses it or is gone."""
    return ask_messages(client, model, openai_messages(chat), max_new_tokens, chat.where)


def ask_messages(client: Any, model: str, messages: Sequence[Any], max_new_tokens: int, where: str) -> str:
    """Greedy answer to messages in the form of the OpenAI API; `VLMQError` that begins with `where` without one."""
    import openai

    try:
        reply = client.chat.completions.create(model=model, messages=messages, max_tokens=max_new_tokens, temperature=0)
    except openai.AuthenticationError:
        raise _wrong_key(where) from None
    except openai.OpenAIError as error:
        raise VLMQError(f"{where}: no answer from the server ({' '.join(str(error).split())[:200]})") from None
    choices = getattr(reply, "choices", None)
    if not choices:
        raise VLMQError(f"{where}: no answer from the server (got {str(reply)[:80]!r}, which has no choices)")
    return str(choices[0].message.content or "").strip()


def answer_remotely(
    base_url: str, chats: Sequence[Chat], *, concurrency: int = 8, max_new_tokens: int = 32
) -> Iterator[str]:
    """Greedy answers in the order of `chats`, `concurrency` requests at a time."""
    client, model = connect(base_url)
    with ThreadPoolExecutor(concurrency) as pool:
        yield from pool.map(lambda chat: ask(client, model, chat, max_new_tokens), chats)
