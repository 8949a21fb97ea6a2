"""Other families than the shipped one: tiny random models, rounded, in vLLM and in transformers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.quant_methods.checkpoints import quantize
from tests.quant_methods.test_engine import EVALUATION, ask, reference_logprobs
from vlmq_serve.calibrate.chats import read_chats
from vlmq_serve.evaluate.loading import load_model

pytestmark = pytest.mark.serve
TOLERANCE = 2e-3  # float32
TEXT = {
    "vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 1024, "initializer_range": 0.3, "tie_word_embeddings": False,
    "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]}


def qwen2() -> Any:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    return Qwen2ForCausalLM(Qwen2Config(**TEXT))


def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**TEXT))


def qwen2_5_vl() -> Any:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    vision = {
        "depth": 2, "hidden_size": 64, "num_heads": 2, "intermediate_size": 128, "out_hidden_size": 128,
        "patch_size": 7, "window_size": 56, "fullatt_block_indexes": [1], "hidden_act": "silu",
    }  # fmt: skip
    text = {**TEXT, "rope_parameters": ROPE}
    tokens = {"image_token_id": 12, "video_token_id": 13, "vision_start_token_id": 9, "vision_end_token_id": 10}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False, **tokens)
    return Qwen2_5_VLForConditionalGeneration(config)


def qwen3_vl() -> Any:
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    vision = {
        "depth": 2, "hidden_size": 64, "num_heads": 2, "intermediate_size": 128, "out_hidden_size": 128,
        "patch_size": 7, "deepstack_visual_indexes": [0], "num_position_embeddings": 64,
    }  # fmt: skip
    text = {**TEXT, "head_dim": 32, "rope_parameters": {**ROPE, "mrope_interleaved": True}}
    tokens = {"image_token_id": 12, "video_token_id": 13, "vision_start_token_id": 9, "vision_end_token_id": 10}
    config = Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False, **tokens)
    return Qwen3VLForConditionalGeneration(config)


def save(model: Any, source: Path, folder: Path, processor: str = "") -> None:
    """Weights and config of `model` with the tokenizer and, for a vision-language model, the processor of `source`."""
    model.bfloat16().save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(source / name, folder)
    if processor:
        settings = json.loads((source / "preprocessor_config.json").read_text())
        (folder / "preprocessor_config.json").write_text(json.dumps({**settings, "processor_class": processor}))


@pytest.mark.parametrize("build", [qwen2, llama])
def test_text_models_give_the_logprobs_of_transformers(
    build: Callable[[], Any], tiny_model: Path, tmp_path: Path, engine: Any
) -> None:
    from vllm import SamplingParams

    torch.manual_seed(0)
    save(build(), tiny_model, tmp_path / "source")
    checkpoint = quantize(tmp_path / "source", tmp_path / "w3", "w3g32")
    prompts = [[5, 99, 300, 41, 77], list(range(20, 60))]
    params = SamplingParams(temperature=0, max_tokens=6, logprobs=1, ignore_eos=True)
    llm = engine(checkpoint, limit_mm_per_prompt=None)
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
    model = load_model(checkpoint, torch.float32)
    for prompt, output in zip(prompts, outputs, strict=True):
        answer = output.outputs[0]
        with torch.inference_mode():
            logits = model(torch.tensor([[*prompt, *answer.token_ids]])).logits[0, len(prompt) - 1 : -1]
        check(answer, logits.log_softmax(-1))


VISION_LANGUAGE = [
    pytest.param(qwen2_5_vl, "Qwen2_5_VLProcessor", id="qwen2_5_vl"),
    pytest.param(qwen3_vl, "Qwen3VLProcessor", id="qwen3_vl"),
]


@pytest.mark.parametrize(("build", "processor_class"), VISION_LANGUAGE)
def test_vision_language_models_give_the_logprobs_of_transformers(
    build: Callable[[], Any], processor_class: str, tiny_model: Path, tmp_path: Path, engine: Any
) -> None:
    from transformers import AutoProcessor

    torch.manual_seed(0)
    save(build(), tiny_model, tmp_path / "source", processor_class)
    checkpoint = quantize(tmp_path / "source", tmp_path / "w3", "w3g32")
    processor, chats = AutoProcessor.from_pretrained(checkpoint), read_chats(EVALUATION)[:4]
    answers = ask(engine(checkpoint), processor, chats)
    model = load_model(checkpoint, torch.float32)
    for chat, answer in zip(chats, answers, strict=True):
        check(answer, reference_logprobs(model, processor, chat, list(answer.token_ids)))


def check(answer: Any, expected: torch.Tensor) -> None:
    """Greedy tokens and their log-probabilities against those of transformers [tokens, vocabulary]."""
    assert answer.token_ids
    for step, token in enumerate(answer.token_ids):
        assert float(expected[step].max() - expected[step, token]) <= TOLERANCE
        assert answer.logprobs[step][token].logprob == pytest.approx(float(expected[step, token]), abs=TOLERANCE)
