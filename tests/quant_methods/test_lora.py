"""LoRA adapters on top of a quantized checkpoint give the log-probabilities of merged weights in transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.quant_methods.checkpoints import quantize_parts
from tests.quant_methods.families import write_family
from tests.quant_methods.test_engine import EVALUATION, ask, reference_logprobs
from vlmq_serve.calibrate.chats import read_chats
from vlmq_serve.evaluate.loading import load_model

pytestmark = pytest.mark.serve
RANK, ALPHA = 4, 8
DECODER = ("q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TOWER = ("qkv", "fc1", "linear_fc1")
TOLERANCE = 2e-3  # float32


def write_adapter(model: Any, folder: Path) -> Path:
    """An adapter in PEFT's form with random A and B for all targets in `model`."""
    folder.mkdir()
    tensors = {}
    for name, module in targets(model):
        for part, shape in (("A", (RANK, module.in_features)), ("B", (module.out_features, RANK))):
            tensors[f"base_model.model.{name}.lora_{part}.weight"] = torch.randn(shape) * 0.1
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": [*DECODER, *TOWER], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def targets(model: Any) -> list[tuple[str, Any]]:
    parts = (("language_model.layers", DECODER), ("visual.blocks", TOWER))
    modules = list(model.named_modules())
    return [(n, m) for part, leaves in parts for n, m in modules if part in n and n.rpartition(".")[2] in leaves]


@torch.no_grad()
def merge(model: Any, adapter: Path) -> None:
    from safetensors.torch import load_file

    tensors = load_file(adapter / "adapter_model.safetensors")
    for name, module in targets(model):
        a, b = (tensors[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
        module.weight += ALPHA / RANK * b @ a


@pytest.mark.parametrize("family", ["shipped", "qwen3_vl"])
def test_an_adapter_on_a_quantized_checkpoint_is_one_on_its_weights(
    family: str, tiny_model: Path, tmp_path: Path, engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the exact kernel: what is tested is how adapters are wired. vLLM wraps head and embeddings of Qwen3 too."""
    from transformers import AutoProcessor
    from vllm.lora.request import LoRARequest

    monkeypatch.setenv("VLMQ_KERNEL", "reference")
    source = tiny_model if family == "shipped" else write_family(family, tiny_model, tmp_path / "source")
    parts = {"lm_head": "w8", "embeddings": "w8", "vision": "w8g32"}
    checkpoint = quantize_parts(source, tmp_path / "w3", "w3g32", overrides={"layers.1": "w4g64"}, **parts)
    model = load_model(checkpoint, torch.float32)
    adapter = write_adapter(model, tmp_path / "adapter")
    processor, chats = AutoProcessor.from_pretrained(checkpoint), read_chats(EVALUATION)[:4]
    llm = engine(checkpoint, enable_lora=True, max_lora_rank=8, max_loras=1, enable_tower_connector_lora=True)
    adapted = ask(llm, processor, chats, lora_request=LoRARequest("adapter", 1, str(adapter)))
    plain = ask(llm, processor, chats)
    check(model, processor, chats, plain)
    merge(model, adapter)
    check(model, processor, chats, adapted)
    assert any(a.token_ids != p.token_ids for a, p in zip(adapted, plain, strict=True))


def check(model: Any, processor: Any, chats: list[Any], answers: list[Any]) -> None:
    for chat, answer in zip(chats, answers, strict=True):
        tokens = list(answer.token_ids)
        expected = reference_logprobs(model, processor, chat, tokens)
        for step, token in enumerate(tokens):
            assert answer.logprobs[step][token].logprob == pytest.approx(float(expected[step, token]), abs=TOLERANCE)
