"""Which image tokens calibration would weigh most, for the picture of the demo."""

from typing import Any

import torch
from torch import Tensor

from vlmq_serve.calibrate.capture import capture_first_inputs
from vlmq_serve.calibrate.chats import Chat
from vlmq_serve.calibrate.families.decoder import ATTENTION
from vlmq_serve.calibrate.families.qwen2_vl import QWEN2_VL
from vlmq_serve.calibrate.importance import local_gradients
from vlmq_serve.calibrate.saliency import saliency_map
from vlmq_serve.calibrate.samples import VISION, build_sample


def image_saliency(full: Any, quantized: Any, processor: Any, chat: Chat) -> Tensor:
    """Mean token importance over decoder layers and projections, [H, W] in vision tokens, mean 1 per layer.

    `full` is the bf16 model, `quantized` the same one with dequantized weights: its hidden states are the quantized
    path on which VLMQ measures its gradients. The first layer is left out: both paths enter it alike.
    """
    family = QWEN2_VL
    sample = build_sample(processor, chat, family.image_token_id(full.config))
    layers = list(zip(family.decoder_layers(full), family.decoder_layers(quantized), strict=True))
    full.requires_grad_(False)
    hidden, batch = capture_first_inputs(full, QWEN2_VL, [sample], torch.device("cpu"))
    ours = theirs = hidden
    total = torch.zeros(sample.length)
    for depth, (layer, rounded) in enumerate(layers):
        if depth:
            taps = ATTENTION.importance_taps
            found = local_gradients(layer, ATTENTION.forward, taps, ours, theirs, batch.kwargs)
            total += sum((g[0] / g.mean() for g in found.values()), torch.zeros(sample.length))
        with torch.no_grad():
            for block in family.blocks:
                ours = block.forward(layer, ours, batch.kwargs)
                theirs = block.forward(rounded, theirs, batch.kwargs)
    weights = total / (len(ATTENTION.importance_taps) * (len(layers) - 1))
    grid = sample.inputs["image_grid_thw"][0]
    return saliency_map(weights[sample.modality == VISION], grid, family.merge_size(full.config))
