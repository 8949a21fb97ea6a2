"""Tiny random models of the families, as their configs on the hub have them, with processors that go with them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.calibrate import test_families as calibrated

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


VISION = {"llava_onevision": {"vision_hidden": 64, "vision_intermediate": 128}}
"""Widths at which vLLM builds SigLIP's MLP quantizable."""


def save(model: Any, source: Path, folder: Path, processor: str = "") -> None:
    """Weights and config of `model` with the tokenizer and, for a vision-language model, the processor of `source`."""
    model.bfloat16().save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(source / name, folder)
    if processor:
        settings = json.loads((source / "preprocessor_config.json").read_text())
        (folder / "preprocessor_config.json").write_text(json.dumps({**settings, "processor_class": processor}))


def save_text(build: Any) -> Any:
    """Writes a text model."""
    return lambda source, folder: save(build(), source, folder)


def save_qwen(build: Any, processor: str) -> Any:
    """Writes a model that takes the image processor of the shipped one."""
    return lambda source, folder: save(build(), source, folder, processor)


def save_with_processor(family: str) -> Any:
    """Writes a LLaVA-OneVision or an InternVL with its own processor, under the tensor names of the hub."""

    def write(source: Path, folder: Path) -> None:
        tokenizer = calibrated.tokenizer_of(family, source)
        text = {**TEXT, "vocab_size": len(tokenizer)}
        model, processor = calibrated.BUILDERS[family](tokenizer, text, **VISION.get(family, {}))
        calibrated.set_unit_gain(model)
        save(model, source, folder)
        template = (source / "chat_template.jinja").read_text()
        old = "<|vision_start|><|image_pad|><|vision_end|>"
        assert old in template
        processor.chat_template = template.replace(old, calibrated.PLACEHOLDERS[family])
        processor.save_pretrained(folder)
        if family == "llava_onevision":
            # transformers 5 leaves a module out of the names that the hub has and vLLM reads.
            rename(folder, {"vision_tower.": "vision_tower.vision_model."})

    return write


def rename(folder: Path, prefixes: dict[str, str]) -> None:
    """Change the beginnings of tensor names; the first that fits counts."""

    def new(name: str) -> str:
        fitting = [old for old in prefixes if name.startswith(old)]
        return prefixes[fitting[0]] + name.removeprefix(fitting[0]) if fitting else name

    path = folder / "model.safetensors"
    save_file({new(name): tensor for name, tensor in load_file(path).items()}, path, {"format": "pt"})


NEW_NAMES = {
    "language_model.lm_head.": "lm_head.",
    "language_model.model.": "model.language_model.",
    "vision_tower.": "model.vision_tower.",
    "multi_modal_projector.": "model.multi_modal_projector.",
    "image_newline": "model.image_newline",
}
"""What transformers has called tensors since 4.52, for files that have the older names."""


FAMILIES: dict[str, Any] = {
    "qwen2": save_text(qwen2),
    "llama": save_text(llama),
    "qwen2_5_vl": save_qwen(qwen2_5_vl, "Qwen2_5_VLProcessor"),
    "qwen3_vl": save_qwen(qwen3_vl, "Qwen3VLProcessor"),
    "llava_onevision": save_with_processor("llava_onevision"),
    "internvl": save_with_processor("internvl"),
}


def write_family(family: str, source: Path, folder: Path) -> Path:
    """The tiny bf16 model of a family; `source` is the shipped model, whose tokenizer it takes."""
    torch.manual_seed(0)
    FAMILIES[family](source, folder)
    return folder
