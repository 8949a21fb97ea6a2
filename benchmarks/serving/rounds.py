"""Rounds: the same request to all variants in turn, so that their ratios are those of one moment.

What two cores take for a token depends on how much of the bandwidth of memory their neighbours leave, and that changes
within minutes: measured one after the other, the same two models came out 1.3 to 3.0 times apart.
"""

import argparse
import base64
import csv
import io
import math
import random
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

from vlmq_serve.device import device_name

WORDS = ("amber", "basin", "cedar", "delta", "ember", "fjord", "grove", "haven", "inlet", "jetty", "knoll", "lagoon")

Content = list[dict[str, Any]]


@dataclass(frozen=True)
class Timing:
    """One request: ms to the first token, ms per later token."""

    round: int
    device: str
    variant: str
    first_ms: float
    later_ms: float


@dataclass(frozen=True)
class Turn:
    """Whose turn it is in which round, with the question of that round."""

    round: int
    variant: str
    content: Content

    def timing(self, first_ms: float, later_ms: float) -> Timing:
        """What this turn took."""
        return Timing(self.round, device_name(), self.variant, round(first_ms, 3), round(later_ms, 3))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What comparisons in rounds share."""
    parser.add_argument(
        "variants", nargs="+", help="NAME=FOLDER@DTYPE; the first is what the others are compared with."
    )
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--words", type=int, default=64, help="Of a question.")
    parser.add_argument("--image", type=int, default=0, help="Side of a picture in pixels; default: no picture.")
    parser.add_argument("--output", type=Path, required=True)


def turns(names: Iterable[str], rounds: int, words: int, image: int) -> Iterator[Turn]:
    """Rounds 0 to `rounds`, in each all `names` in an order of chance; round 0 is not to be counted, as it pays for
    what is set up when first needed."""
    for number in range(rounds + 1):
        chance = random.Random(number)
        content = question(chance, words, image, number)
        for name in chance.sample(sorted(names), len(set(names))):
            yield Turn(number, name, content)


def question(chance: random.Random, words: int, image: int, seed: int) -> Content:
    """Words, behind a picture of `image` pixels a side where that is not 0; new ones every time, so that no cache
    knows them."""
    content: Content = [{"type": "text", "text": " ".join(chance.choices(WORDS, k=words))}]
    if image:
        png = io.BytesIO()
        noise(image, seed).save(png, "PNG")
        url = f"data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}"
        content.insert(0, {"type": "image_url", "image_url": {"url": url}})
    return content


def noise(side: int, seed: int) -> Any:
    """A picture of random pixels."""
    from PIL import Image

    return Image.frombytes("RGB", (side, side), random.Random(seed).randbytes(3 * side * side))


def write(path: Path, timings: Sequence[Timing]) -> None:
    """The CSV file, written again after every request: a row is one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as handle:
        names = [field.name for field in fields(Timing)]
        csv.writer(handle, lineterminator="\n").writerows([names, *(astuple(timing) for timing in timings)])


def summary(timings: Sequence[Timing], baseline: str) -> Iterator[str]:
    """A line for every variant and column: the median, and of the baseline's time over the own in the same round the
    median with its 95 % interval."""
    for column in ("first_ms", "later_ms"):
        by_round = {(t.round, t.variant): float(getattr(t, column)) for t in timings}
        for name in dict.fromkeys(t.variant for t in timings):
            own = {turn: value for (turn, variant), value in by_round.items() if variant == name}
            ratios = [by_round[turn, baseline] / value for turn, value in own.items()]
            low, middle, high = median_interval(ratios)
            yield (
                f"{column} {name}: {statistics.median(own.values()):.2f}, {baseline} over own {middle:.2f} "
                f"({low:.2f} to {high:.2f}), {len(own)} rounds"
            )


def median_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float, float]:
    """The median between two of the sorted values that hold the true one with at least `confidence`, or between the
    lowest and the highest: below the k-th smallest of n lie fewer than k of them with the odds of n tossed coins."""
    ordered, n = sorted(values), len(values)
    tail, rank = 0.0, 0
    while rank < n // 2 and (tail := tail + math.comb(n, rank) / 2**n) <= (1 - confidence) / 2:
        rank += 1
    rank = max(rank, 1)
    return ordered[rank - 1], statistics.median(ordered), ordered[n - rank]
