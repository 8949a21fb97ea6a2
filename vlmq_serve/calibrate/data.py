"""The calibration data of a run: which chats, their hash, and samples made from them."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from torch import Tensor

from vlmq_serve.calibrate.chats import Chat, read_chats
from vlmq_serve.calibrate.recipe import Recipe
from vlmq_serve.calibrate.samples import CalibrationSample, build_samples, choose_chats


@dataclass(frozen=True)
class CalibrationData:
    """Chats drawn from a file of `available`; `digest` covers their messages and images in order."""

    file: Path
    chats: tuple[Chat, ...]
    available: int
    digest: str


def load_data(path: Path, recipe: Recipe) -> CalibrationData:
    """Draw the recipe's samples from a data file; faults are `VLMQError`s with their line."""
    available = read_chats(path)
    chosen = choose_chats(available, recipe.samples, recipe.seed, recipe.allow_text_only)
    digest = hashlib.sha256("".join(chat.digest() for chat in chosen).encode()).hexdigest()
    return CalibrationData(path, tuple(chosen), len(available), digest)


@dataclass
class SampleFeed:
    """Samples one after the other; notes what was dropped and what pictures of the first `keep` will need."""

    processor: Any
    data: CalibrationData
    image_token_id: int
    max_tokens: int | None
    keep: int = 0
    dropped: int = 0
    grids: dict[int, Tensor] = field(default_factory=dict)
    modality: dict[int, Tensor] = field(default_factory=dict)

    def __iter__(self) -> Iterator[CalibrationSample]:
        for sample in build_samples(self.processor, self.data.chats, self.image_token_id):
            if self.max_tokens is not None and sample.length > self.max_tokens:
                self.dropped += 1
                continue
            if sample.index < self.keep and "image_grid_thw" in sample.inputs:
                self.grids[sample.index] = sample.inputs["image_grid_thw"]
                self.modality[sample.index] = sample.modality
            yield sample

    def first(self, count: int) -> list[CalibrationSample]:
        """The first samples that are not too long, outside of the count of what was dropped."""
        samples = build_samples(self.processor, self.data.chats, self.image_token_id)
        return list(islice((s for s in samples if self.max_tokens is None or s.length <= self.max_tokens), count))

    def kept_lines(self) -> dict[str, str]:
        """Where the samples of the pictures come from: sample number to file and line."""
        return {str(index): self.data.chats[index].where for index in self.grids}
