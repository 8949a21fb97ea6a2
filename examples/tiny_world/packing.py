"""Training batches: posters, their questions as token slots, and labels of every vision token."""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from examples.tiny_world.draw import pixels, token_labels, whole_shape_labels
from examples.tiny_world.questions import KINDS, Question, ask
from examples.tiny_world.scenes import Scene, scene_from_seed
from examples.tiny_world.tokenizer import build_tokenizer

SLOT_LENGTH = 14  # tokens of the longest question with its answer, without the final <|im_end|>
MAX_TARGETS = 3  # an answer of at most two tokens, and <|im_end|>
# Which kinds are asked of every training poster; kinds with several sorts of question are asked twice.
SLOT_KINDS = (*KINDS, "count", "chart")
BEFORE_ANSWER = "<|im_end|>\n<|im_start|>assistant\n"


@dataclass(frozen=True)
class Batch:
    """B posters with Q questions each.

    images: uint8 [B, 112, 112, 3]; labels: int64 [B, 64, 5]; shapes: int64 [B, 64]; slots: int64 [B, Q, L];
    places, targets: int64 [B, Q, 3], where in the slot a token is predicted and which; weights: fp32 [B, Q, 3],
    0 for unused places.
    """

    images: Tensor
    labels: Tensor
    shapes: Tensor
    slots: Tensor
    places: Tensor
    targets: Tensor
    weights: Tensor


def questions_of(scene: Scene, kinds: tuple[str, ...]) -> list[Question]:
    """One question per entry of `kinds`, chosen by the scene number alone."""
    rng = random.Random(f"questions of {scene.seed}")
    return [ask(scene, kind, rng) for kind in kinds]


@cache
def prefix_tokens() -> Tensor:
    """The five text tokens around the image: int64 [5]."""
    text = "<|im_start|>user\n<|vision_start|><|vision_end|>"
    return torch.tensor(_tokenizer().encode(text))


@cache
def _tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer()


@cache
def _encode(text: str, answer: str) -> tuple[list[int], list[int]]:
    tokenizer = _tokenizer()
    return tokenizer.encode(text + BEFORE_ANSWER), tokenizer.encode(answer + "<|im_end|>")


def make_batch(first: int, size: int, kinds: tuple[str, ...] = SLOT_KINDS) -> Batch:
    """The batch of the `size` scene numbers from `first` on."""
    scenes = [scene_from_seed(first + i) for i in range(size)]
    shape = (size, len(kinds))
    slots = torch.zeros(*shape, SLOT_LENGTH, dtype=torch.long)
    places = torch.zeros(*shape, MAX_TARGETS, dtype=torch.long)
    targets = torch.zeros(*shape, MAX_TARGETS, dtype=torch.long)
    weights = torch.zeros(*shape, MAX_TARGETS)
    for i, scene in enumerate(scenes):
        for j, question in enumerate(questions_of(scene, kinds)):
            prompt, answer = _encode(question.text, question.answer)
            tokens, count = prompt + answer[:-1], len(answer)
            slots[i, j, : len(tokens)] = torch.tensor(tokens)
            places[i, j, :count] = torch.arange(len(prompt) - 1, len(tokens))
            targets[i, j, :count] = torch.tensor(answer)
            weights[i, j, :count] = 1.0
    images = torch.from_numpy(np.stack([pixels(scene) for scene in scenes]))
    labels = torch.from_numpy(np.stack([token_labels(scene) for scene in scenes]))
    shapes = torch.from_numpy(np.stack([whole_shape_labels(scene) for scene in scenes]))
    return Batch(images, labels, shapes, slots, places, targets, weights)
