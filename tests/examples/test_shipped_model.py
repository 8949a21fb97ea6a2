"""The model in `examples/tiny-qwen2vl` as a user of transformers meets it."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from transformers import AutoModelForImageTextToText, AutoProcessor, Qwen2VLForConditionalGeneration

CHATS = 152


@pytest.fixture(scope="module")
def folder(examples_folder: Path) -> Path:
    return examples_folder / "tiny-qwen2vl"


@pytest.fixture(scope="module")
def processor(folder: Path):
    return AutoProcessor.from_pretrained(folder)


@pytest.fixture(scope="module")
def model(folder: Path):
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()


def answer(model, processor, chat: dict) -> str:
    image, question = chat["messages"][0]["content"]
    picture = Image.open(io.BytesIO(base64.b64decode(image["image"].split(",", 1)[1])))
    messages = [{"role": "user", "content": [{"type": "image"}, question]}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = processor(text=[text], images=[picture], return_tensors="pt")
    with torch.no_grad():
        output = model.generate(**inputs, max_new_tokens=8)
    return processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0]


def test_it_answers_held_out_questions(model, processor, examples_folder: Path) -> None:
    """A loose bound over all kinds; blind guessing reaches about a quarter."""
    lines = (examples_folder / "data" / "evaluation.jsonl").read_text().splitlines()[:CHATS]
    chats = [json.loads(line) for line in lines]
    right = [answer(model, processor, chat) == chat["messages"][1]["content"] for chat in chats]
    assert sum(right) / len(right) >= 0.9


def test_it_is_a_small_bf16_qwen2vl_with_widths_that_quantize(folder: Path, model) -> None:
    assert isinstance(model, Qwen2VLForConditionalGeneration)
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 16e6
    with safe_open(folder / "model.safetensors", "pt") as tensors:
        assert {tensors.get_slice(name).get_dtype() for name in tensors.keys()} == {"BF16"}  # noqa: SIM118
    for name, module in model.model.language_model.layers.named_modules():
        if isinstance(module, torch.nn.Linear):
            assert module.in_features % 64 == 0, name
            assert module.out_features % 32 == 0, name


def test_chat_template_handles_systems_turns_and_prompts(processor) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Where is the star?"}]},
        {"role": "assistant", "content": "top left"},
        {"role": "user", "content": [{"type": "text", "text": "What does the word say?"}]},
    ]
    assert processor.apply_chat_template(messages, add_generation_prompt=True) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>Where is the star?<|im_end|>\n"
        "<|im_start|>assistant\ntop left<|im_end|>\n"
        "<|im_start|>user\nWhat does the word say?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert processor.apply_chat_template(messages[1:3]) == (
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>Where is the star?<|im_end|>\n"
        "<|im_start|>assistant\ntop left<|im_end|>\n"
    )


@pytest.mark.parametrize("text", ["red", "Ünïcödé 漢字 🙂\n\ttab", "<|im_start|>user\n12 345<|im_end|>"])
def test_tokenizer_round_trip(processor, text: str) -> None:
    assert processor.tokenizer.decode(processor.tokenizer.encode(text)) == text


def test_any_image_gets_a_bounded_number_of_tokens(processor) -> None:
    for size in ((112, 112), (640, 480), (30, 200)):
        grid = processor.image_processor([Image.new("RGB", size)], return_tensors="pt")["image_grid_thw"][0]
        assert 64 <= int(grid.prod()) // 4 <= 128
