"""Servers of all variants at once, each asked in turn: ratios of one moment, which a busy machine leaves as they are.

    python -m benchmarks.serving.paired bf16=M/bf16@bfloat16 w4=M/w4@bfloat16 --rounds 20 --output F.csv --logs LOGS

`vlmq bench serve` measures one variant after the other. Here a round is a request to every variant, one at a time; only
that server works, the others wait. `decode_time` does the same without servers.
"""

import argparse
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.serving.rounds import Content, Timing, add_arguments, summary, turns, write
from vlmq_serve.bench.serving import start
from vlmq_serve.bench.variants import Variant, with_arguments
from vlmq_serve.cli.console import one_line_errors, out
from vlmq_serve.evaluate.endpoint import connect

REST_S = 1.5
"""Before every request: workers of vLLM look for work without a pause until a second after their last
(`SpinCondition.busy_loop_s`), and would take a core from the server that is asked next."""


@one_line_errors
def main() -> None:
    """Start all servers, ask, write every time and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--tokens", type=int, default=33, help="Of an answer.")
    parser.add_argument("--arg", action="append", default=[], help="Of `vllm serve`, as for `vlmq bench serve`.")
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
    """All rounds that count."""
    for turn in turns(clients, options.rounds, options.words, options.image):
        time.sleep(REST_S)
        took = ask(*clients[turn.variant], turn.content, options.tokens)
        if turn.round:
            yield turn.timing(*took)


def ask(client: Any, model: str, content: Content, tokens: int) -> tuple[float, float]:
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


if __name__ == "__main__":
    main()
