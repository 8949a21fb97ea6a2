"""Chat templates that the models of the hub have, and chats that their processors refuse."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from tests.calibrate.test_families import TEXT, llava_onevision, tokenizer_of
from vlmq_serve.calibrate.chats import read_chats
from vlmq_serve.calibrate.loading import load_processor
from vlmq_serve.calibrate.rendering import render
from vlmq_serve.calibrate.samples import ANSWER, PROMPT, VISION, build_sample
from vlmq_serve.format.errors import VLMQError

ASK = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
# LLaVA-OneVision's, without video: both read lists of parts only, and put images before all text.
NEWER = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] }}{% endfor %}"
    "{{ '<|im_end|>' + '\\n' }}{% endfor %}" + ASK
)
OLDER = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + ' ' }}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ '\\n' + content['text'] }}"
    "{% endfor %}{{ '<|im_end|>' }}{% endfor %}" + ASK
)


def image(tmp_path, name, size):
    Image.new("RGB", size, (200, 30, 30)).save(tmp_path / name)
    return {"type": "image", "image": name}


def chat_of(tmp_path, *messages):
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps({"messages": messages}))
    return read_chats(path)[0]


def question(*parts, text="Colour?"):
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


@pytest.fixture(scope="module")
def llava(tiny_model):
    """Processor of LLaVA-OneVision and the token that stands for images."""
    tokenizer = tokenizer_of("llava_onevision", tiny_model)
    text = {**TEXT, "vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "pad_token_id": None}
    return llava_onevision(tokenizer, text)[1], tokenizer.convert_tokens_to_ids("<image>")


@pytest.mark.parametrize(("template", "end"), [(NEWER, "<|im_end|>\n"), (OLDER, "<|im_end|>")], ids=["newer", "older"])
def test_plain_texts_reach_a_template_that_reads_parts(llava, tmp_path, template, end):
    processor, image_token = llava
    processor.chat_template = template
    chat = chat_of(
        tmp_path,
        {"role": "system", "content": "Be brief."},
        question(image(tmp_path, "a.png", (56, 56)), image(tmp_path, "b.png", (56, 112))),
        {"role": "assistant", "content": "red"},
        {"role": "user", "content": "Sure?"},
        {"role": "assistant", "content": "assistant"},
    )
    sample = build_sample(processor, chat, image_token)
    ids = sample.inputs["input_ids"][0]
    assert processor.tokenizer.decode(ids[sample.modality == ANSWER]) == f"red{end}assistant{end}"
    prompt = processor.tokenizer.decode(ids[sample.modality == PROMPT])
    assert all(text in prompt for text in ("Be brief.", "Colour?", "Sure?"))
    assert torch.equal(sample.modality == VISION, ids == image_token)
    assert "Sure?" in render(processor, chat.prompt, generation_prompt=True)


def test_what_the_processor_refuses_is_one_error_with_its_line(tiny_model, tmp_path):
    processor = AutoProcessor.from_pretrained(tiny_model)
    token = processor.tokenizer.convert_tokens_to_ids("<|image_pad|>")
    answer = {"role": "assistant", "content": "red"}
    thin = chat_of(tmp_path, question(image(tmp_path, "thin.png", (1000, 3))), answer)
    with pytest.raises(VLMQError, match=r"line 1: .* refuses the chat \(ValueError: absolute aspect ratio"):
        build_sample(processor, thin, token)
    literal = question(image(tmp_path, "c.png", (56, 56)), text="What is <|image_pad|> for?")
    with pytest.raises(VLMQError, match=r"line 1: .* image or video tokens in the text"):
        build_sample(processor, chat_of(tmp_path, literal, answer), token)


def test_an_answer_may_come_first_but_not_alone(tiny_model, tmp_path):
    processor = AutoProcessor.from_pretrained(tiny_model)
    token = processor.tokenizer.convert_tokens_to_ids("<|image_pad|>")
    hello, answer = {"role": "assistant", "content": "Hello"}, {"role": "assistant", "content": "red"}
    chat = chat_of(tmp_path, hello, question(image(tmp_path, "d.png", (56, 56))), answer)
    sample = build_sample(processor, chat, token)
    answers = processor.tokenizer.decode(sample.inputs["input_ids"][0][sample.modality == ANSWER])
    assert answers == "Hello<|im_end|>\nred<|im_end|>\n"
    with pytest.raises(VLMQError, match="line 1: has no question"):
        chat_of(tmp_path, answer)


def test_the_tokenizers_template_serves_where_the_processor_has_none(tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    template = load_processor(folder).chat_template
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(VLMQError, match="has no chat template"):
        load_processor(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": template}))
    assert load_processor(folder).chat_template == template


def test_a_tokenizer_without_its_vocabulary_is_refused(tmp_path):
    """transformers loads Qwen2-VL's without its files, and then it finds special tokens only."""
    source = Path(__file__).resolve().parents[2] / "examples" / "tiny-qwen2vl"
    folder = shutil.copytree(source, tmp_path / "model")
    (folder / "tokenizer.json").unlink()
    settings = json.loads((folder / "tokenizer_config.json").read_text()) | {"tokenizer_class": "Qwen2Tokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(VLMQError, match="the tokenizer reads no text"):
        load_processor(folder)
