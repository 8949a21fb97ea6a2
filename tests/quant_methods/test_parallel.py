"""Two ranks, two stages, and compiled models give the answers of one rank in eager mode."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.quant_methods.checkpoints import quantize_parts
from tests.quant_methods.test_engine import EVALUATION, ask
from vlmq_serve.calibrate.chats import read_chats

pytestmark = pytest.mark.serve
PROMPTS = 8
BASE = {
    "dtype": "float32",
    "max_model_len": 512,
    "max_num_seqs": 4,
    "enforce_eager": True,
    "kv_cache_memory_bytes": 64 << 20,
    "limit_mm_per_prompt": {"image": 1, "video": 0},
    "enable_prefix_caching": False,
    "mm_processor_cache_gb": 0,
}
TOLERANCE = 2e-3  # float32; sums run in another order
FP8_TOLERANCE = 0.5
# Group 32, because half of the 192 inputs of o_proj does not divide by 64; mixed widths go through every layout.
MIXED = {"model.layers.1.mlp": "w2g32s", "model.layers.2.self_attn": "w4g32"}
# Every feature with the arguments that switch it on.
FEATURES: dict[str, dict[str, Any]] = {
    "tensor-parallel-2": {
        "tensor_parallel_size": 2,
        "distributed_executor_backend": "mp",
        "mm_encoder_tp_mode": "data",  # the tiny vision tower has three heads
    },
    "pipeline-parallel-2": {
        "pipeline_parallel_size": 2,
        "distributed_executor_backend": "mp",
        "enforce_eager": False,  # vLLM's second stage on a CPU needs the warm-up, which eager mode leaves out
    },
    "torch-compile": {"enforce_eager": False},
    "prefix-caching-and-chunked-prefill": {
        "enable_prefix_caching": True,
        "enable_chunked_prefill": True,
        "max_num_batched_tokens": 64,
    },
}


@pytest.fixture(scope="module")
def checkpoint(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    parts = {"overrides": MIXED, "lm_head": "w8", "embeddings": "w4"}  # the vocabulary is split, too
    return quantize_parts(tiny_model, tmp_path_factory.mktemp("parallel") / "w3", "w3g32", **parts)


Answers = list[tuple[list[int], list[float]]]


def answers_of(llm: Any, checkpoint: Path) -> Answers:
    """Tokens with their log-probabilities; asked twice, the second time with what the engine has cached."""
    from transformers import AutoProcessor

    processor, chats = AutoProcessor.from_pretrained(checkpoint), read_chats(EVALUATION)[:PROMPTS]
    answers = [*ask(llm, processor, chats), *ask(llm, processor, chats)]
    return [
        (list(a.token_ids), [step[token].logprob for step, token in zip(a.logprobs, a.token_ids, strict=True)])
        for a in answers
    ]


@pytest.fixture(scope="module")
def plain_answers(checkpoint: Path) -> Answers:
    """One rank, eager; `test_engine` holds these against transformers."""
    with closing_engine(checkpoint) as llm:
        return answers_of(llm, checkpoint)


@contextlib.contextmanager
def closing_engine(checkpoint: Path, **arguments: Any) -> Iterator[Any]:
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    llm = LLM(str(checkpoint), **{**BASE, **arguments})
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        cleanup_dist_env_and_memory()


@pytest.mark.parametrize("feature", FEATURES)
def test_the_answers_are_those_of_one_eager_rank(feature: str, checkpoint: Path, plain_answers: Answers) -> None:
    from vllm.compilation.counter import compilation_counter

    compiled = compilation_counter.num_models_seen
    with closing_engine(checkpoint, **FEATURES[feature]) as llm:
        if feature == "torch-compile":
            assert compilation_counter.num_models_seen == compiled + 1
        if feature.endswith("parallel-2"):
            assert llm.llm_engine.vllm_config.parallel_config.world_size == 2
        answers = answers_of(llm, checkpoint)
    for (tokens, logprobs), (expected, expected_logprobs) in zip(answers, plain_answers, strict=True):
        assert tokens == expected
        assert logprobs == pytest.approx(expected_logprobs, abs=TOLERANCE)


@pytest.mark.skipif(not torch.cpu._is_avx512_supported(), reason="vLLM's fp8 KV cache on a CPU needs AVX-512 or AMX")
def test_an_fp8_kv_cache_changes_the_answers_little(checkpoint: Path, plain_answers: Answers) -> None:
    """The cache rounds to three bits of mantissa: other log-probabilities, the same words but for close calls."""
    with closing_engine(checkpoint, kv_cache_dtype="fp8") as llm:
        assert llm.llm_engine.vllm_config.cache_config.cache_dtype == "fp8"
        answers = answers_of(llm, checkpoint)
    first = [(tokens[0] == expected[0], logprobs[0] - wanted[0]) for (tokens, logprobs), (expected, wanted) in
             zip(answers, plain_answers, strict=True)]  # fmt: skip
    assert sum(same for same, _ in first) >= len(first) - 2
    errors = [abs(error) for same, error in first if same]
    assert max(errors) < FP8_TOLERANCE
    assert max(errors) > TOLERANCE  # or the cache was not in fp8
