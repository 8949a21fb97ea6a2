"""Qwen3-VL: behind the first decoder layers, features of inner vision layers are added (DeepStack)."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from vlmq_serve.calibrate.families.qwen2_vl import QWEN2_VL

_MASK, _FEATURES = "visual_pos_masks", "deepstack_visual_embeds"


def add_inner_features(index: int, hidden: Tensor, decoder_inputs: Mapping[str, Any]) -> Tensor:
    """Hidden states [B, T, C] behind layer `index`; the decoder gets a list of features [vision tokens, C]."""
    features = decoder_inputs.get(_FEATURES)
    if features is None or index >= len(features):
        return hidden
    changed = hidden.clone()
    changed[decoder_inputs[_MASK]] += features[index].to(hidden.dtype)
    return changed


QWEN3_VL = replace(
    QWEN2_VL,
    model_type="qwen3_vl",
    source_layers=("model.language_model.layers",),
    check_config=lambda config: None,
    vision_linears=(
        "blocks.*.attn.qkv",
        "blocks.*.attn.proj",
        "blocks.*.mlp.linear_fc[12]",
        "merger.linear_fc[12]",
        "deepstack_merger_list.*.linear_fc[12]",
    ),
    decoder_inputs=(_MASK, _FEATURES),
    behind_layer=add_inner_features,
)
