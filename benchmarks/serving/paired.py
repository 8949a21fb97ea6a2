"""Servers of all variants at once, each asked in turn: ratios of one moment, which a busy machine leaves as they are.

    python -m benchmarks.serving.paired bf16=M/bf16@bfloat16 w4=M/w4@bfloat16 --rounds 20 --output F.csv --logs LOGS

`vlmq bench serve` measures one variant after the other, minutes apart; on two cores whose neighbours take now more and
now less of the bandwidth of memory its ratios came out between 1.3 and 2.2. Here a round is a request to every variant,
the same words to all and in an order of chance, one at a time; only that server works, the others wait. A row of the
file is one request. Printed: medians, and of the first variant's time over the own in the same round the median with
the 95 % interval that order statistics give.
"""

import argparse
import base64
import csv
import io
import math
import random
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

from benchmarks.serving.decode_time import noise
from vlmq_serve.bench.serving import start
from vlmq_serve.bench.variants import Variant, with_arguments
from vlmq_serve.cli.console import out
from vlmq_serve.device import device_name
from vlmq_serve.evaluate.endpoint import connect

WORDS = ("amber", "basin", "cedar", "delta", "ember", "fjord", "grove", "haven", "inlet", "jetty", "knoll", "lagoon")


REST_S = 1.5
"""Before every request: workers of vLLM look for work without a pause until a second after their last
(`SpinCondition.busy_loop_s`), and would take a core from the server that is asked next."""


@dataclass(frozen=True)
class Timing:
    """One request: ms to the first token, ms per later token."""

    round: int
    device: str
    variant: str
    first_ms: float
    later_ms: float


def main() -> None:
    """Start all servers, ask, write every time and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "variants", nargs="+", help="NAME=FOLDER@DTYPE; the first is what the others are compared with."
    )
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--words", type=int, default=64, help="Of a question.")
    parser.add_argument("--tokens", type=int, default=33, help="Of an answer.")
    parser.add_argument("--image", type=int, default=0, help="Side of a picture in pixels; default: no picture.")
    parser.add_argument("--arg", action="append", default=[], help="Of `vllm serve`, as for `vlmq bench serve`.")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--logs", type=Path, required=True, help="A folder for what the servers say.")
    options = parser.parse_args()
    variants = with_arguments([Variant.parse(text) for text in options.variants], options.arg)
    timings: list[Timing] = []
    with ExitStack() as stack:
        urls = {}
        for variant in variants:
            urls[variant.name] = stack.enter_context(start(variant, options.logs, timeout_s=900)).base_url
            out.print(f"{variant.name}: ready")
        clients = {name: connect(url) for name, url in urls.items()}
        for timing in ask_in_turn(clients, options):
            timings.append(timing)
            write(options.output, timings)
    for line in summary(timings, variants[0].name):
        out.print(line)


def ask_in_turn(clients: dict[str, tuple[Any, str]], options: argparse.Namespace) -> Iterator[Timing]:
    """All rounds; the one before the first is not counted, as it pays for what servers set up lazily."""
    device = device_name()
    for turn in range(options.rounds + 1):
        chance = random.Random(turn)
        content = question(chance, options.words, options.image, turn)
        for name in chance.sample(sorted(clients), len(clients)):
            time.sleep(REST_S)
            first, later = ask(*clients[name], content, options.tokens)
            if turn:
                yield Timing(turn, device, name, round(first, 3), round(later, 3))


def question(chance: random.Random, words: int, image: int, seed: int) -> list[dict[str, Any]]:
    """Words, behind a picture where there is one; another one every time, so that no cache knows it."""
    content: list[dict[str, Any]] = [{"type": "text", "text": " ".join(chance.choices(WORDS, k=words))}]
    if image:
        png = io.BytesIO()
        noise(image, seed).save(png, "PNG")
        url = f"data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}"
        content.insert(0, {"type": "image_url", "image_url": {"url": url}})
    return content


def ask(client: Any, model: str, content: list[dict[str, Any]], tokens: int) -> tuple[float, float]:
    """Ms to the first token of the answer, and ms per later one."""
    pieces, used = [], 0
    begin = time.perf_counter()
    for chunk in client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": content}], max_tokens=tokens, temperature=0, stream=True,
        stream_options={"include_usage": True}, extra_body={"ignore_eos": True},
    ):  # fmt: skip
        if chunk.choices:
            pieces.append(time.perf_counter() - begin)
        if chunk.usage:
            used = chunk.usage.completion_tokens
    return 1000 * pieces[0], 1000 * (pieces[-1] - pieces[0]) / (used - 1)


def write(path: Path, timings: Sequence[Timing]) -> None:
    """The CSV file, again after every request."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as handle:
        names = [field.name for field in fields(Timing)]
        csv.writer(handle, lineterminator="\n").writerows([names, *(astuple(timing) for timing in timings)])


def summary(timings: Sequence[Timing], baseline: str) -> Iterator[str]:
    """A line for every variant and column."""
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


if __name__ == "__main__":
    main()
