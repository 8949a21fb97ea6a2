"""LLaVA-OneVision: a SigLIP tower, a projector and Qwen2."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from vlmq_serve.calibrate.families.qwen2_vl import QWEN2_VL

_SIGLIP_MULTIPLE = 64


def siglip_refusal(vision_config: Mapping[str, Any], local: str) -> str | None:
    """vLLM's SigLIP takes a quantization method for its MLP only where both widths are multiples of 64."""
    widths = vision_config.get("hidden_size", 0), vision_config.get("intermediate_size", 0)
    if ".mlp." not in local or not any(width % _SIGLIP_MULTIPLE for width in widths):
        return None
    return f"vLLM leaves SigLIP's MLP unquantized at widths {widths[0]} and {widths[1]}, which 64 does not divide"


LLAVA_ONEVISION = replace(
    QWEN2_VL,
    model_type="llava_onevision",
    source_layers=("model.language_model.layers", "language_model.model.layers"),
    vision_tower="model.vision_tower",
    merger="model.multi_modal_projector",
    before_layers=(
        "model.vision_tower",
        "model.multi_modal_projector",
        "model.language_model.embed_tokens",
        "model.language_model.rotary_emb",
    ),
    left_alone=("vision_tower", "multi_modal_projector", "lm_head"),
    merge_size=lambda config: 1,
    source_vision=(
        "vision_tower.vision_model",
        "model.vision_tower.vision_model",
        "vision_tower",
        "model.vision_tower",
    ),
    vision_linears=("encoder.layers.*.self_attn.*_proj", "encoder.layers.*.mlp.fc[12]"),
    vision_refusal=siglip_refusal,
)
