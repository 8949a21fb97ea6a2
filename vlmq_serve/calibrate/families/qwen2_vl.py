"""Qwen2-VL."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from vlmq_serve.calibrate.families.adapter import ModelAdapter, Producer, ResidualBlock
from vlmq_serve.format.errors import VLMQError


def attention_block(layer: nn.Module, hidden: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
    """`hidden + attention(norm(hidden))` of a Qwen2-VL decoder layer."""
    normed = layer.get_submodule("input_layernorm")(hidden)
    attended, _ = layer.get_submodule("self_attn")(hidden_states=normed, **kwargs)
    return hidden + attended


def mlp_block(layer: nn.Module, hidden: Tensor, _: Mapping[str, Any]) -> Tensor:
    """`hidden + mlp(norm(hidden))` of a Qwen2-VL decoder layer."""
    normed = layer.get_submodule("post_attention_layernorm")(hidden)
    return hidden + layer.get_submodule("mlp")(normed)


def head_dim(layer: nn.Module) -> int:
    """Width of one attention head."""
    attention: Any = layer.get_submodule("self_attn")
    return int(attention.head_dim)


def _check_config(config: Any) -> None:
    kinds = set(config.get_text_config().layer_types)
    if kinds != {"full_attention"}:
        raise VLMQError(f"qwen2_vl: got layer types {sorted(kinds)}, supported: full_attention only")


_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_O = ("self_attn.o_proj",)
VALUES = Producer("self_attn.v_proj", head_dim=head_dim)
ATTENTION = ResidualBlock(
    attention_block,
    linear_groups=(_QKV, _O),
    importance_taps=(*_QKV, *_O),
    producers=(Producer("input_layernorm"), VALUES),
)
MLP = ResidualBlock(
    mlp_block,
    linear_groups=(("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",)),
    producers=(Producer("post_attention_layernorm"), Producer("mlp.up_proj")),
)

QWEN2_VL = ModelAdapter(
    model_type="qwen2_vl",
    layers="model.language_model.layers",
    source_layers=("model.language_model.layers", "model.layers"),
    blocks=(ATTENTION, MLP),
    vision_tower="model.visual",
    merger="model.visual.merger",
    before_layers=("model.visual", "model.language_model.embed_tokens", "model.language_model.rotary_emb"),
    image_token_id=lambda config: int(config.image_token_id),
    merge_size=lambda config: int(config.vision_config.spatial_merge_size),
    check_config=_check_config,
)
