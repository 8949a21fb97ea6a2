"""Linear layers that are measured, and random weights for them."""

from dataclasses import dataclass

import torch

from vlmq_serve.format.scheme import Scheme
from vlmq_serve.format.weight import PackedWeight


@dataclass(frozen=True)
class Layer:
    """One linear of a model's decoder: N outputs, K inputs; members of a fused layer are one matrix, as served."""

    model: str
    name: str
    out_features: int
    in_features: int


LAYERS = (
    Layer("2B", "qkv", 2048, 1536),
    Layer("2B", "o", 1536, 1536),
    Layer("2B", "gate_up", 17920, 1536),
    Layer("2B", "down", 1536, 8960),
    Layer("7B", "qkv", 4608, 3584),
    Layer("7B", "o", 3584, 3584),
    Layer("7B", "gate_up", 37888, 3584),
    Layer("7B", "down", 3584, 18944),
)
"""Decoder linears of Qwen2-VL-2B and 7B-Instruct (hidden, intermediate and key-value sizes of their config.json)."""


def random_weight(layer: Layer, scheme: Scheme, dtype: torch.dtype, device: torch.device) -> PackedWeight:
    """Uniform codes and zeros, scales of `dtype` around 0.02; the same every time and on every device."""
    generator = torch.Generator().manual_seed(0)
    groups = (layer.out_features, scheme.num_groups(layer.in_features))
    levels = scheme.max_code + 1
    shape = (layer.out_features, layer.in_features)
    codes = torch.randint(0, levels, shape, generator=generator, dtype=torch.uint8).to(device)
    zeros = None if scheme.symmetric else torch.randint(0, levels, groups, generator=generator).to(device)
    scales = torch.rand(groups, generator=generator) * 0.02 + 0.01
    return PackedWeight.from_codes(codes, scales.to(device, dtype), zeros, scheme)
