"""Reads the data file: JSON lines, one chat with its images per line. Serves calibration and evaluation."""

import base64
import binascii
import hashlib
import io
import json
import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps, UnidentifiedImageError

from vlmq_serve.format.errors import VLMQError

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Chat:
    """One line: messages in chat-template form (images as `{"type": "image"}`), image sources in order, its task."""

    file: Path
    line: int
    messages: tuple[Mapping[str, Any], ...]
    image_sources: tuple[str, ...]
    task: str | None = None

    @property
    def where(self) -> str:
        return f"{self.file}, line {self.line}"

    @property
    def prompt(self) -> list[Mapping[str, Any]]:
        """Messages before the last answer."""
        return list(self.messages[:-1])

    @property
    def answer(self) -> str:
        """Text of the last message, which is the assistant's."""
        return message_text(self.messages[-1])

    def image_bytes(self) -> list[bytes]:
        """Encoded images in order; a missing or undecodable source is a `VLMQError`."""
        return [_read_source(source, self) for source in self.image_sources]

    def images(self, max_pixels: int | None = None) -> list[Image.Image]:
        """Decoded RGB images in order, as vLLM would see them, or scaled down; a broken one is a `VLMQError`."""
        encoded = zip(self.image_bytes(), self.image_sources, strict=True)
        return [scale_down(_decode(data, source, self), max_pixels) for data, source in encoded]

    def digest(self) -> str:
        """SHA-256 of messages and image bytes."""
        hashed = hashlib.sha256(json.dumps(self.messages, sort_keys=True, ensure_ascii=False).encode())
        for data in self.image_bytes():
            hashed.update(hashlib.sha256(data).digest())
        return hashed.hexdigest()


def read_chats(path: Path) -> list[Chat]:
    """All chats of a data file in order; images are not opened yet. Each fault is one `VLMQError` with its line."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise VLMQError(f"data file {path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise VLMQError(f"data file {path}: not UTF-8 text ({error.reason}); expected JSON lines") from None
    # Not splitlines: it also breaks at characters such as U+2028, which JSON strings may hold.
    chats = [_parse(line, path, number) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not chats:
        raise VLMQError(f"data file {path}: is empty; expected one chat per line: {{'messages': [...]}}")
    return chats


def message_text(message: Mapping[str, Any]) -> str:
    """Text of a message, its parts joined."""
    content = message["content"]
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if part["type"] == "text")


def scale_down(image: Image.Image, max_pixels: int | None) -> Image.Image:
    """`image`, or where it has more than `max_pixels` a smaller one of the same aspect ratio."""
    pixels = image.width * image.height
    if max_pixels is None or pixels <= max_pixels:
        return image
    factor = math.sqrt(max_pixels / pixels)
    # Rounded down, so that the limit holds.
    size = max(1, int(image.width * factor)), max(1, int(image.height * factor))
    return image.resize(size, Image.Resampling.BICUBIC)


def _parse(line: str, path: Path, number: int) -> Chat:
    where = f"{path}, line {number}"
    try:
        raw = json.loads(line)
    except json.JSONDecodeError as error:
        raise VLMQError(f"{where}: not valid JSON ({error.msg} at column {error.colno})") from None
    if not isinstance(raw, dict) or not isinstance(raw.get("messages"), list) or not raw["messages"]:
        raise VLMQError(f"{where}: got no list 'messages'; expected {{'messages': [{{'role': ..., 'content': ...}}]}}")
    sources: list[str] = []
    messages = tuple(_parse_message(message, sources, where) for message in raw["messages"])
    if messages[-1]["role"] != "assistant" or not message_text(messages[-1]).strip():
        raise VLMQError(f"{where}: has no answer; the last message must be the assistant's and not empty")
    if any(part["type"] == "image" for part in messages[-1]["content"] if isinstance(part, dict)):
        raise VLMQError(f"{where}: has an image in its answer, and models answer with text; put it into the question")
    if len(messages) == 1:
        raise VLMQError(f"{where}: has no question; put the user's message before the answer")
    task = raw.get("task")
    return Chat(path, number, messages, tuple(sources), None if task is None else str(task))


def _parse_message(message: Any, sources: list[str], where: str) -> Mapping[str, Any]:
    role = message.get("role") if isinstance(message, dict) else None
    if role not in ROLES:
        raise VLMQError(f"{where}: got role {role!r}, allowed {ROLES}")
    content = message.get("content")
    if isinstance(content, str):
        return {"role": role, "content": content}
    if not isinstance(content, list):
        raise VLMQError(f"{where}: got content of type {type(content).__name__}, allowed text or a list of parts")
    return {"role": role, "content": [_parse_part(part, sources, where) for part in content]}


def _parse_part(part: Any, sources: list[str], where: str) -> dict[str, str]:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    source = part.get("image") if kind == "image" else None
    if kind == "image_url":
        url = part.get("image_url")
        source = url.get("url") if isinstance(url, dict) else url
    if not isinstance(source, str) or not source:
        raise VLMQError(
            f"{where}: got a content part {str(part)[:80]!r}; allowed {{'type': 'text', 'text': ...}}, "
            "{'type': 'image', 'image': path or data URL} and {'type': 'image_url', 'image_url': {'url': ...}}"
        )
    sources.append(source)
    return {"type": "image"}


def _read_source(source: str, chat: Chat) -> bytes:
    shown = source if len(source) <= 80 else source[:60] + "..."
    if source.startswith("data:"):
        header, comma, payload = source.partition(",")
        if not comma or not header.endswith(";base64"):
            raise VLMQError(f"{chat.where}: image {shown!r} is no base64 data URL (data:image/png;base64,...)")
        try:
            return base64.b64decode(payload, validate=True)
        except binascii.Error as error:
            raise VLMQError(f"{chat.where}: image {shown!r} has broken base64 ({error})") from None
    if "://" in source:
        raise VLMQError(f"{chat.where}: image {shown!r} is a web address; save it as a file and give its path")
    try:
        return (chat.file.parent / source).read_bytes()
    except OSError as error:
        raise VLMQError(
            f"{chat.where}: image {shown!r} cannot be read ({error.strerror}); paths are relative to the data file"
        ) from None


def _decode(data: bytes, source: str, chat: Chat) -> Image.Image:
    try:
        with Image.open(io.BytesIO(data)) as image:
            return _as_rgb(image)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        shown = source if len(source) <= 80 else source[:60] + "..."
        detail = "not an image" if isinstance(error, UnidentifiedImageError) else str(error)
        fault = f"{chat.where}: image {shown!r} is broken ({detail})"
        raise VLMQError(f"{fault}; replace the image, or remove the line") from None


def _as_rgb(image: Image.Image) -> Image.Image:
    """The picture that vLLM would see: upright as its EXIF data say, on white where it is transparent."""
    with suppress(Exception):  # EXIF data may be broken in many ways; the picture is then taken as it lies
        image = ImageOps.exif_transpose(image)
    if image.mode == "RGB" or not image.has_transparency_data:
        return image.convert("RGB")
    layered = image.convert("RGBA")
    flat = Image.new("RGB", layered.size, "white")
    flat.paste(layered, mask=layered.getchannel("A"))
    return flat
