"""InternVL in the form of transformers (`...-hf`): an InternViT tower, a projector, and Qwen2, Qwen3 or Llama."""

from dataclasses import replace
from typing import Any

from vlmq_serve.calibrate.families.llava_onevision import LLAVA_ONEVISION
from vlmq_serve.calibrate.families.qwen2_vl import check_full_attention
from vlmq_serve.format.errors import VLMQError

_DECODERS = ("qwen2", "qwen3", "llama")


def _check_config(config: Any) -> None:
    text = config.get_text_config()
    if text.model_type not in _DECODERS:
        raise VLMQError(f"internvl: got a decoder of type {text.model_type!r}, supported: {', '.join(_DECODERS)}")
    if getattr(text, "layer_types", None):
        check_full_attention(config)


INTERNVL = replace(
    LLAVA_ONEVISION,
    model_type="internvl",
    merge_size=lambda config: round(1 / config.downsample_ratio),
    check_config=_check_config,
    vision_linears=(),  # vLLM builds InternViT and the projector without a quantization method
    vision_refusal=lambda config, local: None,
)
