"""Chats as the model reads them: text by its own chat template, then tokens and pixels by its own processor."""

from collections.abc import Mapping, Sequence
from typing import Any

from vlmq_serve.format.errors import VLMQError

Messages = Sequence[Mapping[str, Any]]
_PROBE = "vlmq-probe"


def render(processor: Any, messages: Messages, generation_prompt: bool = False) -> str:
    """`messages` by the chat template; plain texts become lists of parts where the template reads nothing else."""
    return _apply(processor, messages, _needs_parts(processor), generation_prompt)


def answer_header(processor: Any, earlier: Messages) -> str | None:
    """`earlier` and what the template writes before an answer's text; None where it does not show answers.

    That is not always what it writes where an answer is to come: LLaVA-OneVision's first template had `assistant ` in
    one place and `assistant` in the other.
    """
    header, probe, _ = render(processor, [*earlier, {"role": "assistant", "content": _PROBE}]).rpartition(_PROBE)
    return header if probe else None


def process(processor: Any, texts: list[str], images: list[Any], where: str, **settings: Any) -> Any:
    """What the processor makes of rendered chats and all their images; what it refuses is a `VLMQError`.

    The template has written all special tokens: vLLM adds none to a chat either.
    """
    given = {"text": texts, "images": images or None, "return_tensors": "pt", "add_special_tokens": False}
    try:
        return processor(**given, **settings)
    except (ValueError, LookupError, TypeError, RuntimeError, StopIteration) as error:
        detail = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise VLMQError(
            f"{where}: the model's processor refuses the chat ({detail}); look for images of odd shape and for image "
            "or video tokens in the text, or remove the line"
        ) from None


def _needs_parts(processor: Any) -> bool:
    """Whether the template leaves out, without an error, a text that is no list of parts, as LLaVA-OneVision's does.

    vLLM makes the same distinction (`--chat-template-content-format`).
    """
    probe = [{"role": role, "content": _PROBE} for role in ("user", "assistant")]
    plain, parts = (_apply(processor, probe, as_parts, False).count(_PROBE) for as_parts in (False, True))
    return plain < parts


def _apply(processor: Any, messages: Messages, as_parts: bool, generation_prompt: bool) -> str:
    given = [dict(message) for message in messages]
    for message in given:
        if as_parts and isinstance(message["content"], str):
            message["content"] = [{"type": "text", "text": message["content"]}]
    return str(processor.apply_chat_template(given, tokenize=False, add_generation_prompt=generation_prompt))
