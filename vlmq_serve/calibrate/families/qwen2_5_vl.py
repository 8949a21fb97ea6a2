"""Qwen2.5-VL: another vision tower than Qwen2-VL's, the same places."""

from dataclasses import replace

from vlmq_serve.calibrate.families.qwen2_vl import QWEN2_VL

QWEN2_5_VL = replace(
    QWEN2_VL,
    model_type="qwen2_5_vl",
    vision_linears=("blocks.*.attn.qkv", "blocks.*.attn.proj", "blocks.*.mlp.*_proj", "merger.mlp.[02]"),
)
