"""Other families than the shipped one: tiny random models, rounded, in vLLM and in transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests.quant_methods.checkpoints import quantize, quantize_parts
from tests.quant_methods.families import NEW_NAMES, rename, write_family
from tests.quant_methods.test_engine import EVALUATION, ask, reference_logprobs
from vlmq_serve.calibrate.chats import read_chats
from vlmq_serve.evaluate.loading import load_model
from vlmq_serve.format.headers import quantized_modules, read_tensor_index
from vlmq_serve.format.names import part_of_model

pytestmark = pytest.mark.serve
TOLERANCE = 2e-3  # float32
SEEN = 2e-2
PROMPTS = [[5, 99, 300, 41, 77], list(range(20, 60))]


@pytest.fixture(autouse=True)
def exact_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is tested is how families are wired; the CPU's kernel, with inputs of 16 bits, is held to limits of its own
    in tests/kernels and serves in test_engine.py."""
    monkeypatch.setenv("VLMQ_KERNEL", "reference")


@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_text_models_give_the_logprobs_of_transformers(
    family: str, tiny_model: Path, tmp_path: Path, engine: Any
) -> None:
    source = write_family(family, tiny_model, tmp_path / "source")
    checkpoint = quantize(source, tmp_path / "w3", "w3g32")
    check_text(engine(checkpoint, limit_mm_per_prompt=None), load_model(checkpoint, torch.float32))


@pytest.mark.parametrize(
    ("family", "tower"),
    [("qwen2_5_vl", "w4g32"), ("qwen3_vl", "w8g32"), ("llava_onevision", "w4g32"), ("internvl", None)],
)
def test_vision_language_models_give_the_logprobs_of_transformers(
    family: str, tower: str | None, tiny_model: Path, tmp_path: Path, engine: Any
) -> None:
    """Decoder, head, embeddings and, where vLLM builds it quantizable, vision tower quantized; about images and on
    text alone."""
    source = write_family(family, tiny_model, tmp_path / "source")
    checkpoint = quantize_parts(source, tmp_path / "w3", "w3g32", lm_head="w8", embeddings="w4", vision=tower)
    kinds = {part_of_model(name) for name in quantized_modules(read_tensor_index(checkpoint))}
    assert kinds == {"decoder", "lm_head", "embeddings", *(["vision"] if tower else [])}
    llm, model = engine(checkpoint), load_model(checkpoint, torch.float32)
    check_images(llm, model, checkpoint)
    check_text(llm, model)


@pytest.mark.parametrize("family", ["llava_onevision", "internvl"])
def test_newer_tensor_names_are_served(family: str, tiny_model: Path, tmp_path: Path, engine: Any) -> None:
    """The tests above have the names that the hub has."""
    source = write_family(family, tiny_model, tmp_path / "source")
    rename(source, NEW_NAMES)
    checkpoint = quantize(source, tmp_path / "w3", "w3g32")
    check_images(engine(checkpoint), load_model(checkpoint, torch.float32), checkpoint)


def check_images(llm: Any, model: Any, checkpoint: Path) -> None:
    from transformers import AutoProcessor

    processor, chats = AutoProcessor.from_pretrained(checkpoint), read_chats(EVALUATION)[:4]
    for chat, answer in zip(chats, ask(llm, processor, chats), strict=True):
        tokens = list(answer.token_ids)
        expected = reference_logprobs(model, processor, chat, tokens)
        check(answer, expected)
        blank = [Image.new("RGB", chat.images()[0].size)]
        other = reference_logprobs(model, processor, chat, tokens, blank)
        assert float((other - expected).abs().max()) > SEEN  # the image is looked at


def check_text(llm: Any, model: Any) -> None:
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=6, logprobs=1, ignore_eos=True)
    outputs = llm.generate([{"prompt_token_ids": p} for p in PROMPTS], params, use_tqdm=False)
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        answer = output.outputs[0]
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([[*prompt, *answer.token_ids]])).logits[0, len(prompt) - 1 : -1]
        check(answer, logits.log_softmax(-1))


def check(answer: Any, expected: torch.Tensor) -> None:
    """Greedy tokens and their log-probabilities against those of transformers [tokens, vocabulary]."""
    assert answer.token_ids
    for step, token in enumerate(answer.token_ids):
        assert float(expected[step].max() - expected[step, token]) <= TOLERANCE
        assert answer.logprobs[step][token].logprob == pytest.approx(float(expected[step, token]), abs=TOLERANCE)
