"""vLLM in this process gives the answers and log-probabilities of transformers with the dequantized weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.quant_methods.checkpoints import quantize, quantize_parts
from vlmq_serve.calibrate.chats import Chat, read_chats
from vlmq_serve.evaluate.loading import load_model

pytestmark = pytest.mark.serve

EVALUATION = Path(__file__).resolve().parents[2] / "examples" / "data" / "evaluation.jsonl"
PROMPTS = 8  # the file goes through its kinds of question in turn
NEW_TOKENS = 8
# Widths for single modules, and head, embeddings and vision tower besides; the model ties its head to its embeddings.
MIXED = {
    "model.layers.0.self_attn": "w3g32",
    "model.layers.1.mlp.gate_proj": "w2g32s",
    "model.layers.1.mlp.up_proj": "w2g32s",
    "model.layers.2.mlp.down_proj": "w2g64",
    "model.layers.3": "w4g-1",
}
EVERYTHING = {"overrides": MIXED, "lm_head": "w4g64", "vision": "w8g32", "embeddings": "w3g64"}
# float32 shows that the weights are the same ones. bfloat16 takes other paths and rounds activations, in other places
# than transformers does: there the unquantized model differs between the two by 0.03 as well.
CASES = [
    pytest.param("w2g32", {}, "float32", 1e-3, id="w2-float32"),
    pytest.param("w3g64s", {}, "bfloat16", 0.05, id="w3-symmetric-bfloat16"),
    pytest.param("w4g64", EVERYTHING, "float32", 1e-3, id="w4-and-others-all-parts-float32"),
]


def ask(llm: Any, processor: Any, chats: Sequence[Chat], **options: Any) -> list[Any]:
    """Greedy answers of an engine with the log-probability of every token; `options` go to its `generate`."""
    from vllm import SamplingParams

    prompts = [{"prompt": render(processor, chat), "multi_modal_data": {"image": chat.images()[0]}} for chat in chats]
    params = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, logprobs=1)
    outputs = llm.generate(prompts, params, use_tqdm=False, **options)
    return [output.outputs[0] for output in outputs]


def render(processor: Any, chat: Chat) -> str:
    return processor.apply_chat_template(chat.prompt, tokenize=False, add_generation_prompt=True)


def reference_logprobs(
    model: Any, processor: Any, chat: Chat, generated: list[int], images: Sequence[Any] | None = None
) -> torch.Tensor:
    """Log-probabilities [tokens, vocabulary] where `generated` stands, from transformers in one forward pass.

    images: others than those of the chat.
    """
    inputs = processor(text=[render(processor, chat)], images=images or chat.images(), return_tensors="pt")
    tokens = torch.cat([inputs["input_ids"], torch.tensor([generated])], dim=1)
    if "mm_token_type_ids" in inputs:
        inputs["mm_token_type_ids"] = torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, len(generated)))
    others = {key: value for key, value in inputs.items() if key not in ("input_ids", "attention_mask")}
    others["pixel_values"] = others["pixel_values"].to(model.dtype)
    with torch.inference_mode():
        logits = model(input_ids=tokens, attention_mask=torch.ones_like(tokens), **others).logits
    return logits[0, -len(generated) - 1 : -1].float().log_softmax(-1)


@pytest.mark.parametrize(("scheme", "settings", "dtype", "tolerance"), CASES)
def test_answers_and_logprobs_equal_transformers(
    tiny_model: Path, tmp_path: Path, engine: Any, scheme: str, settings: dict, dtype: str, tolerance: float
) -> None:
    from transformers import AutoProcessor

    write = quantize_parts if settings else quantize
    checkpoint = write(tiny_model, tmp_path / "out", scheme, **settings)
    processor, model = AutoProcessor.from_pretrained(checkpoint), load_model(checkpoint, getattr(torch, dtype))
    chats = read_chats(EVALUATION)[:PROMPTS]
    answers = ask(engine(checkpoint, dtype=dtype), processor, chats)
    assert len({answer.text for answer in answers}) > 2
    for chat, answer in zip(chats, answers, strict=True):
        generated = list(answer.token_ids)
        expected = reference_logprobs(model, processor, chat, generated)
        for step, token in enumerate(generated):
            assert float(expected[step].max() - expected[step, token]) <= tolerance
            assert answer.logprobs[step][token].logprob == pytest.approx(float(expected[step, token]), abs=tolerance)
