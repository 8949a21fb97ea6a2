"""Processor time per decoded token, one process and one thread: what neighbours on the machine disturb least.

    OMP_NUM_THREADS=1 python -m benchmarks.serving.decode_time bf16=OUT/bf16@bfloat16 w4=OUT/w4@bfloat16 --output F.csv

`vlmq bench serve` is what users see; it needs a machine to itself. This is the vLLM engine without a server, on a
prompt of fixed length, and what an answer of 1 + N tokens takes more than one of 1 token, median over the repeats.
Ratios are to the first variant.
"""

import argparse
import csv
import os
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from vlmq_serve.bench.variants import Variant
from vlmq_serve.cli.console import out
from vlmq_serve.kernels.bench.measure import device_name

PROMPT = [*range(20, 52)]
TOKENS = 16
BOUNDS: dict[str, Any] = {
    "max_model_len": 256,
    "max_num_seqs": 1,
    "enforce_eager": True,
    "kv_cache_memory_bytes": 64 << 20,
    "enable_prefix_caching": False,
    "limit_mm_per_prompt": {"image": 0, "video": 0},
}
ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1"}


def main() -> None:
    """Measure every variant and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variants", nargs="+")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    os.environ.update(ENVIRONMENT)
    variants = [Variant.parse(text) for text in options.variants]
    times = {variant.name: measure(variant, options.repeats) for variant in variants}
    first = times[variants[0].name]
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with options.output.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.writer(handle, lineterminator="\n")
        writer.writerow(
            ["device", "variant", "dtype", "processor_ms_per_token", f"times_faster_than_{variants[0].name}"]
        )
        for variant in variants:
            own = times[variant.name]
            row = [device_name(torch.device("cpu")), variant.name, variant.dtype, f"{own:.2f}", f"{first / own:.3f}"]
            writer.writerow(row)
            out.print(row)


def measure(variant: Variant, repeats: int) -> float:
    """Median milliseconds of processor time per decoded token."""
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    llm = LLM(str(variant.folder), dtype=variant.dtype, **BOUNDS)

    def seconds(tokens: int) -> float:
        params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
        started = time.process_time()
        llm.generate([{"prompt_token_ids": PROMPT}], params, use_tqdm=False)
        return time.process_time() - started

    seconds(2)
    per_token = [1000 * (seconds(1 + TOKENS) - seconds(1)) / TOKENS for _ in range(repeats)]
    llm.llm_engine.engine_core.shutdown()
    cleanup_dist_env_and_memory()
    return statistics.median(per_token)


if __name__ == "__main__":
    main()
