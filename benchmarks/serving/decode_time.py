"""Processor time to the first and per later token, one process and one thread: what neighbours disturb least.

    OMP_NUM_THREADS=1 python -m benchmarks.serving.decode_time bf16=OUT/bf16@bfloat16 w4=OUT/w4@bfloat16 --output F.csv

`vlmq bench serve` is what users see; it needs a machine to itself. This is the vLLM engine without a server: an answer
of 1 token to a short question, with --image 448 about a picture of that side, and what one of 1 + N tokens takes more.
Medians over the repeats, ratios to the first variant. A process per variant, so that none inherits another's memory.
"""

import argparse
import csv
import os
import random
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from itertools import count
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from vlmq_serve.bench.variants import Variant
from vlmq_serve.cli.console import out
from vlmq_serve.device import device_name

QUESTION = "What is on the picture? " * 2
TOKENS = 16
BOUNDS: dict[str, Any] = {
    "max_model_len": 1024,
    "max_num_seqs": 1,
    "enforce_eager": True,
    "kv_cache_memory_bytes": 64 << 20,
    "enable_prefix_caching": False,
    "mm_processor_cache_gb": 0,
}
COLUMNS = ("prompt_tokens", "first_token_ms", "ms_per_token")
ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1"}


def main() -> None:
    """Measure every variant and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variants", nargs="+")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--image", type=int, default=0, help="Side of a picture in pixels; default: no picture.")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    os.environ.update(ENVIRONMENT)
    variants = [Variant.parse(text) for text in options.variants]
    rows: list[list[str]] = []
    first: tuple[float, ...] = ()
    for variant in variants:
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            own = pool.submit(measure, variant, options.image, options.repeats).result()
        first = first or own
        ratios = [f"{first[index] / own[index]:.3f}" for index in (1, 2)]
        rows.append([device_name(), variant.name, variant.dtype, *(f"{value:.2f}" for value in own), *ratios])
        out.print(rows[-1])
        write(options.output, rows, variants[0].name)


def write(path: Path, rows: list[list[str]], baseline: str) -> None:
    """The CSV file, again after every variant."""
    path.parent.mkdir(parents=True, exist_ok=True)
    header = ["device", "variant", "dtype", *COLUMNS, *(f"{what}_{baseline}_over_own" for what in ("first", "later"))]
    with path.open("w", newline="", encoding="utf-8") as handle:
        csv.writer(handle, lineterminator="\n").writerows([header, *rows])


def measure(variant: Variant, image: int, repeats: int) -> tuple[float, float, float]:
    """Tokens of the prompt, and medians of processor time: ms to the first token, ms per later token."""
    from vllm import LLM, SamplingParams

    limit = {"image": 1 if image else 0, "video": 0}
    llm = LLM(str(variant.folder), dtype=variant.dtype, limit_mm_per_prompt=limit, **BOUNDS)
    pictures = (noise(image, seed) for seed in count())  # a new one each time: nothing of it is in a cache

    def ask(tokens: int) -> tuple[float, int]:
        shown = [{"type": "image_pil", "image_pil": next(pictures)}] if image else []
        messages = [{"role": "user", "content": [*shown, {"type": "text", "text": QUESTION}]}]
        params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
        started = time.process_time()
        (answer,) = llm.chat(messages, params, use_tqdm=False)
        return 1000 * (time.process_time() - started), len(answer.prompt_token_ids)

    _, prompt = ask(2)
    firsts = [ask(1)[0] for _ in range(repeats)]
    later = [(ask(1 + TOKENS)[0] - first) / TOKENS for first in firsts]
    return prompt, statistics.median(firsts), statistics.median(later)


def noise(side: int, seed: int) -> Any:
    """A picture of random pixels."""
    from PIL import Image

    return Image.frombytes("RGB", (side, side), random.Random(seed).randbytes(3 * side * side))


if __name__ == "__main__":
    main()
