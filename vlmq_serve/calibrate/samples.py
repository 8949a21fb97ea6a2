"""Chats to model inputs, with the modality of every token."""

import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlmq_serve.calibrate.chats import Chat
from vlmq_serve.calibrate.rendering import answer_header, process, render
from vlmq_serve.format.errors import VLMQError

MODALITIES = ("vision", "prompt", "answer")
VISION, PROMPT, ANSWER = range(3)


@dataclass(frozen=True)
class CalibrationSample:
    """inputs: what the processor gives for one chat; modality: uint8 [T], an index into `MODALITIES` per token."""

    index: int
    where: str
    inputs: Mapping[str, Tensor]
    modality: Tensor

    def __post_init__(self) -> None:
        if self.modality.shape != self.inputs["input_ids"].shape[1:]:
            raise VLMQError(f"{self.where}: {self.modality.shape[0]} modalities for {self.length} tokens")

    @property
    def length(self) -> int:
        return int(self.inputs["input_ids"].shape[1])

    @property
    def nbytes(self) -> int:
        """Memory of the inputs, most of it the pixels'."""
        return sum(tensor.nbytes for tensor in self.inputs.values())


def draw(available: int, count: int, seed: int) -> list[int]:
    """Indices of `count` of `available` chats in order; all of them, whatever the seed, where there are no more."""
    if available <= count:
        return list(range(available))
    return sorted(random.Random(seed).sample(range(available), count))


def choose_chats(chats: list[Chat], count: int, seed: int, allow_text_only: bool) -> list[Chat]:
    """Draw `count` chats (all, if there are fewer) with `seed`, in file order."""
    chosen = [chats[i] for i in draw(len(chats), count, seed)]
    blind = [chat for chat in chosen if not chat.image_sources]
    if blind and not allow_text_only:
        raise VLMQError(
            f"{blind[0].where}: has no image ({len(blind)} of {len(chosen)} chats); calibration is image-conditioned, "
            "remove these chats or set allow_text_only"
        )
    return chosen


def build_samples(
    processor: Any, chats: Iterable[Chat], image_token_id: int, max_pixels: int | None = None
) -> Iterator[CalibrationSample]:
    """One sample per chat, in order, made when asked for (pixels of large images add up)."""
    for index, chat in enumerate(chats):
        yield build_sample(processor, chat, image_token_id, index, max_pixels)


def build_sample(
    processor: Any, chat: Chat, image_token_id: int, index: int = 0, max_pixels: int | None = None
) -> CalibrationSample:
    """Run the model's own chat template and processor over one chat, its images scaled down to `max_pixels`."""
    text = render(processor, chat.messages)
    inputs = dict(process(processor, [text], chat.images(max_pixels), chat.where))
    encoded = processor.tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
    spans = _answer_spans(processor, chat, text)
    plain = [
        ANSWER if any(first <= start < last for first, last in spans) else PROMPT
        for start, _ in encoded["offset_mapping"]
    ]
    ids = inputs["input_ids"][0].tolist()
    modality = _expand(encoded["input_ids"], plain, ids, image_token_id, chat.where)
    return CalibrationSample(index, chat.where, inputs, torch.tensor(modality, dtype=torch.uint8))


def _answer_spans(processor: Any, chat: Chat, text: str) -> list[tuple[int, int]]:
    """Character ranges of the assistant's turns in the rendered chat."""
    spans = []
    for i, message in enumerate(chat.messages):
        if message["role"] != "assistant":
            continue
        before = answer_header(processor, chat.messages[:i])
        after = render(processor, chat.messages[: i + 1])
        if before is None or not text.startswith(before) or not text.startswith(after):
            raise VLMQError(
                f"{chat.where}: the model's chat template rewrites earlier turns, so answers cannot be located; "
                "use chats with one question and one answer"
            )
        spans.append((len(before), len(after)))
    return spans


def _expand(plain_ids: list[int], plain: list[int], ids: list[int], image_token: int, where: str) -> list[int]:
    """Modalities after the processor turned each image placeholder into one token per patch group.

    Some processors put a token before and one behind an image's tokens; these count as prompt. Of the others,
    placeholders that stand side by side become one run of image tokens.
    """
    modality: list[int] = []
    behind_image = framed = False
    for token, kind in zip(plain_ids, plain, strict=True):
        if token == image_token:
            if behind_image and not framed:
                continue
            if behind_image:
                modality.append(PROMPT)
            framed = ids[len(modality) : len(modality) + 1] != [image_token]
            if framed:
                modality.append(PROMPT)
            run = len(modality)
            while run < len(ids) and ids[run] == image_token:
                run += 1
            modality += [VISION] * (run - len(modality))
            behind_image = True
            continue
        if behind_image and ids[len(modality) : len(modality) + 1] != [token]:
            modality.append(PROMPT)
        behind_image = False
        if ids[len(modality) : len(modality) + 1] != [token]:
            raise VLMQError(
                f"{where}: the processor's tokens do not follow the chat template's text at {len(modality)}"
            )
        modality.append(kind)
    if len(modality) != len(ids):
        raise VLMQError(
            f"{where}: the processor gave {len(ids)} tokens, the chat template accounts for {len(modality)}"
        )
    return modality
