"""Token weights of MBQ (Li et al., CVPR 2025): one weight per modality and block, from gradients of the answers.

At the output of a block's last linear (o_proj, down_proj), g the gradient of the answers' cross-entropy:

    rho = mean over vision tokens |g| / mean over answer tokens |g|, not below the median over all layers
    l_t = rho for vision, 1 for answer, 0 for prompt tokens
"""

import math
from collections.abc import Sequence
from statistics import median

import torch
from torch import Tensor

from vlmq_serve.calibrate.families.adapter import ModelAdapter
from vlmq_serve.calibrate.metrics import mean_by_modality
from vlmq_serve.calibrate.samples import ANSWER, VISION
from vlmq_serve.calibrate.sources import Gradients


def gradient_ratio(gradients: Sequence[Tensor], modality: Sequence[Tensor]) -> float:
    """Mean gradient of vision over that of answer tokens, from [B, T] per batch; 1 where a modality is missing."""
    values = torch.cat([g.reshape(1, -1) for g in gradients], 1)
    kinds = torch.cat([m.reshape(1, -1) for m in modality], 1)
    means = mean_by_modality(values, kinds)
    ratio = means["vision"] / means["answer"] if means["answer"] else float("nan")
    return 1.0 if math.isnan(ratio) else ratio


def modality_ratios(
    layers: Sequence[Gradients], adapter: ModelAdapter, modality: Sequence[Tensor]
) -> list[list[float]]:
    """rho per layer and block."""
    last = [block.linear_groups[-1][-1] for block in adapter.blocks]
    ratios = [[gradient_ratio(layer[name], modality) for name in last] for layer in layers]
    floors = [median(column) for column in zip(*ratios, strict=True)]
    return [[max(ratio, floor) for ratio, floor in zip(row, floors, strict=True)] for row in ratios]


def modality_weights(modality: Sequence[Tensor], ratio: float) -> list[Tensor]:
    """l_t, fp32 [B, T] per batch."""
    return [(kinds == ANSWER).float() + ratio * (kinds == VISION).float() for kinds in modality]
