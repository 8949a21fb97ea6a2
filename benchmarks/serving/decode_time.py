"""Time to the first and per later token in vLLM's engines, a process for each variant, asked in turn.

    OMP_NUM_THREADS=1 python -m benchmarks.serving.decode_time bf16=OUT/bf16@bfloat16 w4=OUT/w4@bfloat16 --output F.csv

This is the engine without a server, in eager mode or, with --compile, as `vllm serve` runs it. On one thread its
processor time is what neighbours disturb least; with more threads the time on the wall is what counts: --clock wall.
A later token is what an answer of 1 + N tokens takes longer than one of 1 token, divided by N.
"""

import argparse
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from multiprocessing import get_context
from typing import Any

from benchmarks.serving.rounds import Content, Timing, add_arguments, summary, turns, write
from vlmq_serve.bench.variants import Variant
from vlmq_serve.cli.console import one_line_errors, out

CLOCKS: dict[str, Callable[[], float]] = {"processor": time.process_time, "wall": time.perf_counter}
BOUNDS: dict[str, Any] = {
    "max_model_len": 1024,
    "max_num_seqs": 1,
    "kv_cache_memory_bytes": 64 << 20,
    "enable_prefix_caching": False,
    "mm_processor_cache_gb": 0,
}
ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1"}


@one_line_errors
def main() -> None:
    """Load all engines, ask, write every time and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--tokens", type=int, default=17, help="Of an answer.")
    parser.add_argument("--clock", choices=[*CLOCKS], default="processor")
    parser.add_argument("--compile", action="store_true", help="With torch.compile.")
    options = parser.parse_args()
    os.environ.update(ENVIRONMENT)
    variants = [Variant.parse(text) for text in options.variants]
    timings: list[Timing] = []
    with ExitStack() as stack:
        pools = {}
        for variant in variants:
            pools[variant.name] = stack.enter_context(ProcessPoolExecutor(1, get_context("spawn")))
            pools[variant.name].submit(load, variant, options.compile).result()
            out.print(f"{variant.name}: ready")
        for timing in ask_in_turn(pools, options):
            timings.append(timing)
            write(options.output, timings)
    for line in summary(timings, variants[0].name):
        out.print(line)


def ask_in_turn(pools: dict[str, ProcessPoolExecutor], options: argparse.Namespace) -> Iterator[Timing]:
    """All rounds that count."""
    for turn in turns(pools, options.rounds, options.words, options.image):
        took = pools[turn.variant].submit(ask, turn.content, options.tokens, options.clock).result()
        if turn.round:
            yield turn.timing(*took)


def load(variant: Variant, compiled: bool) -> None:
    """The engine of this process."""
    from vllm import LLM

    limits = {"image": 1, "video": 0}
    _engine.append(
        LLM(str(variant.folder), dtype=variant.dtype, limit_mm_per_prompt=limits, enforce_eager=not compiled, **BOUNDS)
    )


_engine: list[Any] = []


def ask(content: Content, tokens: int, clock: str) -> tuple[float, float]:
    """Ms to the first token of the answer, and ms per later one."""
    from vllm import SamplingParams

    def taken(length: int) -> float:
        started = CLOCKS[clock]()
        parameters = SamplingParams(temperature=0, max_tokens=length, ignore_eos=True)
        _engine[0].chat([{"role": "user", "content": content}], parameters, use_tqdm=False)
        return 1000 * (CLOCKS[clock]() - started)

    first = taken(1)
    return first, (taken(tokens) - first) / (tokens - 1)


if __name__ == "__main__":
    main()
