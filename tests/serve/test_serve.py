"""The `vllm serve` command as a user types it: no flag of ours, answers to images, an error for a bad checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.quant_methods.checkpoints import quantize
from vlmq_serve.calibrate.chats import read_chats
from vlmq_serve.evaluate.answers import answer_locally
from vlmq_serve.evaluate.endpoint import answer_remotely
from vlmq_serve.evaluate.loading import load_model
from vlmq_serve.evaluate.server import serve
from vlmq_serve.format.errors import VLMQError

pytestmark = pytest.mark.serve
EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
BOUNDS = ("--max-model-len", "512", "--kv-cache-memory-bytes", str(64 << 20), "--enforce-eager")
QUESTIONS = 3


@pytest.fixture(autouse=True)
def _bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """One thread per process, nothing from outside; and not the one-process mode of the engine tests."""
    for name, value in {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}.items():
        monkeypatch.setenv(name, value)
    for name in ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_CPU_OMP_THREADS_BIND", "VLLM_LOGGING_LEVEL"):
        monkeypatch.delenv(name, raising=False)


def test_a_served_checkpoint_answers_questions_about_images(tmp_path: Path) -> None:
    from transformers import AutoProcessor

    checkpoint = quantize(EXAMPLES / "tiny-qwen2vl", tmp_path / "tiny-w4", "w4g64")
    chats = list(read_chats(EXAMPLES / "data" / "evaluation.jsonl"))[:QUESTIONS]
    with serve(checkpoint, tmp_path / "serve.log", arguments=BOUNDS, timeout_s=500) as server:
        answers = list(answer_remotely(server.base_url, chats, concurrency=1, max_new_tokens=8))
        assert "quantization=vlmq" in server.log.read_text()
    model, processor = load_model(checkpoint, torch.bfloat16), AutoProcessor.from_pretrained(checkpoint)
    expected = [answer.text for answer in answer_locally(model, processor, chats, batch_size=1, max_new_tokens=8)]
    assert answers == expected
    assert all(answers)


def test_a_checkpoint_without_one_tensor_is_not_served(tmp_path: Path) -> None:
    checkpoint = quantize(EXAMPLES / "tiny-qwen2vl", tmp_path / "tiny-w4", "w4g64")
    shard = checkpoint / "model.safetensors"
    tensors = load_file(shard)
    del tensors["model.layers.0.mlp.up_proj.qweight"]
    save_file(tensors, shard, {"format": "pt"})
    with (
        pytest.raises(VLMQError, match=r"(?s)ended with status [1-9].*a tensor was removed or renamed"),
        serve(checkpoint, tmp_path / "serve.log", arguments=BOUNDS, timeout_s=300),
    ):
        pass
