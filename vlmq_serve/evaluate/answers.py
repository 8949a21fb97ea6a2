"""Greedy answers to the questions of a data file, from a transformers model in this process."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vlmq_serve.calibrate.chats import Chat
from vlmq_serve.calibrate.rendering import process, render


@dataclass(frozen=True)
class Answer:
    """Text without special tokens, and the generated token ids up to and without the end token."""

    text: str
    tokens: tuple[int, ...]


def is_correct(answer: str, expected: str) -> bool:
    """Exact match after white space, letter case and a final full stop are put aside."""
    return _plain(answer) == _plain(expected)


def answer_locally(
    model: Any, processor: Any, chats: Sequence[Chat], *, batch_size: int = 32, max_new_tokens: int = 32
) -> Iterator[Answer]:
    """Greedy answers in the order of `chats`, `batch_size` at a time, left-padded."""
    processor.tokenizer.padding_side = "left"
    for start in range(0, len(chats), batch_size):
        batch = chats[start : start + batch_size]
        yield from _answer_batch(model, processor, batch, max_new_tokens)


@torch.inference_mode()
def _answer_batch(model: Any, processor: Any, chats: Sequence[Chat], max_new_tokens: int) -> list[Answer]:
    texts = [render(processor, chat.prompt, True) for chat in chats]
    images = [image for chat in chats for image in chat.images()]
    where = chats[0].where if len(chats) == 1 else f"{chats[0].where} to {chats[-1].line}"
    inputs = process(processor, texts, images, where, padding=True).to(model.device)
    tokens = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    new = tokens[:, inputs["input_ids"].shape[1] :].tolist()
    ends = _end_tokens(model, processor)
    return [_cut(row, ends, processor) for row in new]


def _end_tokens(model: Any, processor: Any) -> set[int]:
    end = model.generation_config.eos_token_id
    ends = set(end) if isinstance(end, list) else {end}
    return (ends | {processor.tokenizer.eos_token_id, processor.tokenizer.pad_token_id}) - {None}


def _cut(row: list[int], ends: set[int], processor: Any) -> Answer:
    length = next((i for i, token in enumerate(row) if token in ends), len(row))
    kept = row[:length]
    return Answer(processor.tokenizer.decode(kept, skip_special_tokens=True).strip(), tuple(kept))


def _plain(text: str) -> str:
    return " ".join(text.casefold().split()).removesuffix(".")
