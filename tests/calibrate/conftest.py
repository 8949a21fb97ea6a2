"""A random tiny Qwen2-VL with its processor, and a data file of chats with images."""

import json
import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import ModuleType

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
VIDEO = "<|video_pad|>"
TEMPLATE = (
    "{%- for m in messages -%}{{- '<|im_start|>' + m['role'] + '\\n' -}}"
    "{%- if m['content'] is string -%}{{- m['content'] -}}"
    "{%- else -%}{%- for p in m['content'] -%}{%- if p['type'] == 'image' -%}"
    "{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}{%- else -%}{{- p['text'] -}}{%- endif -%}{%- endfor -%}"
    "{%- endif -%}{{- '<|im_end|>\\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)
QUESTIONS = ["What colour is it?", "Which colour do you see in the picture?", "Colour?"]
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (20, 40, 230), "grey": (128, 128, 128)}


def _tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[*SPECIAL, VIDEO],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*QUESTIONS, "system user assistant", *COLOURS] * 20, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=[*SPECIAL, VIDEO],
    )


def _config(tokenizer: PreTrainedTokenizerFast) -> Qwen2VLConfig:
    ids = tokenizer.convert_tokens_to_ids
    return Qwen2VLConfig(
        text_config={
            "vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
            "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4},
            "tie_word_embeddings": True, "bos_token_id": None, "eos_token_id": ids("<|im_end|>"),
        },
        vision_config={
            "depth": 1, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2, "patch_size": 14,
        },
        image_token_id=ids("<|image_pad|>"), video_token_id=ids(VIDEO),
        vision_start_token_id=ids("<|vision_start|>"), vision_end_token_id=ids("<|vision_end|>"),
        tie_word_embeddings=True,
    )  # fmt: skip


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the model: bf16 weights of unit gain, processor, chat template."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    tokenizer = _tokenizer()
    torch.manual_seed(0)
    model = Qwen2VLForConditionalGeneration(_config(tokenizer)).to(torch.bfloat16)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and "norm" not in name:
                parameter.normal_(0, 1.0 / parameter.shape[1] ** 0.5)
    model.save_pretrained(folder)
    images = Qwen2VLImageProcessor(min_pixels=28 * 28, max_pixels=112 * 112)
    Qwen2VLProcessor(images, tokenizer, Qwen2VLVideoProcessor(), chat_template=TEMPLATE).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def data_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 chats of three lengths over images of two sizes; every third image stands in the line as a data URL."""
    import base64

    folder = tmp_path_factory.mktemp("data")
    generator = random.Random(0)
    lines = []
    for i in range(24):
        colour = generator.choice(list(COLOURS))
        image = Image.new("RGB", (112, 56 if i % 2 else 112), COLOURS[colour])
        for _ in range(400):
            spot = generator.randrange(image.width), generator.randrange(image.height)
            image.putpixel(spot, tuple(generator.randrange(256) for _ in range(3)))
        path = folder / f"{i}.png"
        image.save(path)
        part = {"type": "image", "image": path.name}
        if i % 3 == 0:
            url = "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
            part = {"type": "image_url", "image_url": {"url": url}}
        content = [part, {"type": "text", "text": generator.choice(QUESTIONS)}]
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": colour}]
        lines.append(json.dumps({"messages": messages, "task": "colour"}))
    file = folder / "chats.jsonl"
    file.write_text("\n".join(lines) + "\n")
    return file


@pytest.fixture
def interrupted_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[ModuleType, str, int], AbstractContextManager[None]]:
    """`with interrupted_at(module, "function", 2):` is a run that ends by Ctrl-C at the second call of the function."""

    @contextmanager
    def run(module: ModuleType, name: str, call: int) -> Iterator[None]:
        original, calls = getattr(module, name), []

        def counted(*args, **kwargs):
            calls.append(1)
            if len(calls) == call:
                raise KeyboardInterrupt
            return original(*args, **kwargs)

        with monkeypatch.context() as patched:
            patched.setattr(module, name, counted)
            with pytest.raises(KeyboardInterrupt):
                yield

    return run
