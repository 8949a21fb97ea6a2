"""Qwen2-VL."""

from typing import Any

from vlmq_serve.calibrate.families.adapter import ModelAdapter
from vlmq_serve.calibrate.families.decoder import ATTENTION, MLP
from vlmq_serve.format.errors import VLMQError


def check_full_attention(config: Any) -> None:
    """Layers with sliding windows get other masks, which the capture at the first layer would miss."""
    kinds = set(config.get_text_config().layer_types)
    if kinds != {"full_attention"}:
        raise VLMQError(f"{config.model_type}: got layer types {sorted(kinds)}, supported: full_attention only")


QWEN2_VL = ModelAdapter(
    model_type="qwen2_vl",
    layers="model.language_model.layers",
    source_layers=("model.language_model.layers", "model.layers"),
    blocks=(ATTENTION, MLP),
    vision_tower="model.visual",
    merger="model.visual.merger",
    before_layers=("model.visual", "model.language_model.embed_tokens", "model.language_model.rotary_emb"),
    left_alone=("visual", "lm_head"),
    image_token_id=lambda config: int(config.image_token_id),
    merge_size=lambda config: int(config.vision_config.spatial_merge_size),
    check_config=check_full_attention,
    source_vision=("model.visual", "visual"),
    vision_linears=("blocks.*.attn.qkv", "blocks.*.attn.proj", "blocks.*.mlp.fc[12]", "merger.mlp.[02]"),
)
