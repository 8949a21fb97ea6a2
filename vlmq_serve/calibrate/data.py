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
    """Samples one after the other, of images of at most `max_pixels`; notes what was dropped and what pictures of the
    first `keep` will need."""

    processor: Any
    data: CalibrationData
    image_token_id: int
    max_tokens: int | None
    max_pixels: int | None = None
    keep: int = 0
    dropped: int = 0
    grids: dict[int, Tensor] = field(default_factory=dict)
    modality: dict[int, Tensor] = field(default_factory=dict)

    def __iter__(self) -> Iterator[CalibrationSample]:
        for sample in self._all():
            if not self._fits(sample):
                self.dropped += 1
                continue
            if sample.index < self.keep and "image_grid_thw" in sample.inputs:
                self.grids[sample.index] = sample.inputs["image_grid_thw"]
                self.modality[sample.index] = sample.modality
            yield sample

    def first(self, count: int) -> list[CalibrationSample]:
        """The first samples that are not too long, outside of the count of what was dropped."""
        return list(islice(filter(self._fits, self._all()), count))

    def sizes(self) -> Iterator[tuple[int, int]]:
        """Tokens and bytes of the samples that are not too long, outside of that count too."""
        return ((sample.length, sample.nbytes) for sample in self._all() if self._fits(sample))

    def kept_lines(self) -> dict[str, str]:
        """Where the samples of the pictures come from: sample number to file and line."""
        return {str(index): self.data.chats[index].where for index in self.grids}

    def _all(self) -> Iterator[CalibrationSample]:
        return build_samples(self.processor, self.data.chats, self.image_token_id, self.max_pixels)

    def _fits(self, sample: CalibrationSample) -> bool:
        return self.max_tokens is None or sample.length <= self.max_tokens
