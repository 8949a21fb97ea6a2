"""The architecture of the tiny Qwen2-VL model and its folder on disk."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from examples.tiny_world.draw import SIDE
from examples.tiny_world.tokenizer import CHAT_TEMPLATE, build_tokenizer

PATCH = 7
MERGE = 2
VOCAB_ROWS = 512
IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)


def build_config(tokenizer: PreTrainedTokenizerFast) -> Qwen2VLConfig:
    """64 vision tokens for a 112x112 image, widths that divide by 64, head size 32 in both towers.

    The rotary base is 100 and not 1,000,000 because positions stay below 40: with a large base the frequencies that
    M-RoPE gives to rows and columns turn by hundredths of a radian over an image. The initial deviation 0.06 suits a
    width of 192 (1/sqrt(192) = 0.07); with the usual 0.02 attention starts out uniform and takes long to leave that.
    """
    names = ("image_pad", "video_pad", "vision_start", "vision_end", "endoftext", "im_end")
    ids = {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in names}
    return Qwen2VLConfig(
        text_config={
            "vocab_size": VOCAB_ROWS,
            "hidden_size": 192,
            "intermediate_size": 512,
            "num_hidden_layers": 4,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "max_position_embeddings": 1024,
            "rms_norm_eps": 1e-6,
            "initializer_range": 0.06,
            "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [4, 6, 6]},
            "bos_token_id": ids["endoftext"],
            "eos_token_id": ids["im_end"],
            "pad_token_id": ids["endoftext"],
            "tie_word_embeddings": True,
        },
        vision_config={
            "depth": 3,
            "embed_dim": 96,
            "num_heads": 3,
            "mlp_ratio": 2,
            "hidden_size": 192,
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "temporal_patch_size": 2,
        },
        image_token_id=ids["image_pad"],
        video_token_id=ids["video_pad"],
        vision_start_token_id=ids["vision_start"],
        vision_end_token_id=ids["vision_end"],
        tie_word_embeddings=True,
    )


def build_model(seed: int) -> Qwen2VLForConditionalGeneration:
    """A freshly initialised fp32 model; the same seed gives the same weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Qwen2VLForConditionalGeneration(build_config(build_tokenizer()))
    return model.float()


def build_image_processor() -> Qwen2VLImageProcessorPil:
    """The image processor: scales any image to an area near 112x112 pixels, 7-pixel patches, 2x2 merged."""
    return Qwen2VLImageProcessorPil(
        patch_size=PATCH,
        merge_size=MERGE,
        temporal_patch_size=2,
        image_mean=list(IMAGE_MEAN),
        image_std=list(IMAGE_STD),
        size={"shortest_edge": SIDE * SIDE, "longest_edge": 2 * SIDE * SIDE},
    )


def save_folder(model: Qwen2VLForConditionalGeneration, folder: Path) -> None:
    """Write the Hugging Face folder: bf16 weights, tokenizer, processor, chat template, generation defaults."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    shipped = Qwen2VLForConditionalGeneration(model.config)
    shipped.load_state_dict(model.state_dict())
    shipped.generation_config = GenerationConfig(
        bos_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=False,
    )
    shipped.to(torch.bfloat16).save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    tokenizer._set_processor_class("Qwen2VLProcessor")
    tokenizer.save_pretrained(folder)
    build_image_processor().save_pretrained(folder)
