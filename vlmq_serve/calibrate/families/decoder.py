"""The decoder layer that Qwen2, Qwen2.5, Qwen3 and Llama share: two residual blocks behind RMS norms."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from vlmq_serve.calibrate.families.adapter import Producer, ResidualBlock


def attention_block(layer: nn.Module, hidden: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
    """`hidden + attention(norm(hidden))`."""
    normed = layer.get_submodule("input_layernorm")(hidden)
    attended, _ = layer.get_submodule("self_attn")(hidden_states=normed, **kwargs)
    return hidden + attended


def mlp_block(layer: nn.Module, hidden: Tensor, _: Mapping[str, Any]) -> Tensor:
    """`hidden + mlp(norm(hidden))`."""
    normed = layer.get_submodule("post_attention_layernorm")(hidden)
    return hidden + layer.get_submodule("mlp")(normed)


def head_dim(layer: nn.Module) -> int:
    """Width of one attention head."""
    attention: Any = layer.get_submodule("self_attn")
    return int(attention.head_dim)


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
