"""Spread the channels of a decoder over orders of magnitude, without changing what it computes.

In large language models a few activation channels are many times larger than the rest (Dettmers et al.,
"LLM.int8()", 2022; Xiao et al., "SmoothQuant", 2023), and that is what makes plain rounding fail. A model this small,
an hour old, has grown none and hardly notices 2-bit weights. Scaling a channel up where it is made and down where it is
read is exact for powers of two, so the answers stay the same to the bit while the weights become as uneven as those of
a large model.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import Qwen2VLForConditionalGeneration


@torch.no_grad()
def spread_channels(model: Qwen2VLForConditionalGeneration, deviation: float, seed: int = 0) -> None:
    """Rescale in place: channels of both norms, of the values and of the MLP times 2**k, their readers times 2**-k.

    k is normal with standard deviation `deviation`, rounded to integers. Every output stays equal to the bit unless a
    weight leaves the range of its dtype.
    """
    generator = torch.Generator().manual_seed(seed)

    def scales(count: int) -> Tensor:
        return 2.0 ** torch.round(torch.randn(count, generator=generator) * deviation)

    for layer in model.model.language_model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        readers = (
            (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
        )
        for norm, linears in readers:
            scale = scales(norm.weight.numel())
            norm.weight.mul_(scale)
            for linear in linears:
                linear.weight.div_(scale)
        scale = scales(attention.v_proj.out_features)
        attention.v_proj.weight.mul_(scale[:, None])
        attention.v_proj.bias.mul_(scale)
        # Every query head of a group reads the same values.
        per_head = scale.view(-1, attention.head_dim).repeat_interleave(attention.num_key_value_groups, dim=0)
        attention.o_proj.weight.div_(per_head.flatten())
        scale = scales(mlp.up_proj.out_features)
        mlp.up_proj.weight.mul_(scale[:, None])
        mlp.down_proj.weight.div_(scale)
