"""The tiny Qwen2-VL of the examples, and vLLM engines in this process."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# Read by vLLM when it is imported: one process, bounded threads, nothing from outside.
os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    OMP_NUM_THREADS="1",
    VLLM_NO_USAGE_STATS="1",
    VLLM_LOGGING_LEVEL="WARNING",
    HF_HUB_OFFLINE="1",
)


@pytest.fixture(scope="session")
def tiny_model() -> Path:
    """The trained model of the examples: real answers, small enough to load in a second."""
    return Path(__file__).resolve().parents[2] / "examples" / "tiny-qwen2vl"


@pytest.fixture
def damaged(tmp_path: Path) -> Callable[[Path], Path]:
    """Makes a copy of a checkpoint that a test may damage."""

    def copy(checkpoint: Path) -> Path:
        return Path(shutil.copytree(checkpoint, tmp_path / "damaged"))

    return copy


@pytest.fixture
def engine() -> Iterator[Callable[..., Any]]:
    """Starts vLLM engines in this process as `engine(folder, dtype=...)`; each one is gone after its test."""
    started: list[Any] = []

    def start(folder: Path, dtype: str = "float32", **arguments: Any) -> Any:
        from vllm import LLM

        defaults: dict[str, Any] = {
            "max_model_len": 512,
            "max_num_seqs": 4,
            "enforce_eager": True,
            "kv_cache_memory_bytes": 64 << 20,
            "limit_mm_per_prompt": {"image": 1, "video": 0},
        }
        started.append(LLM(str(folder), dtype=dtype, **{**defaults, **arguments}))
        return started[-1]

    yield start
    from vllm.distributed import cleanup_dist_env_and_memory

    while started:
        started.pop().llm_engine.engine_core.shutdown()
    cleanup_dist_env_and_memory()
