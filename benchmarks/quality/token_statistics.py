"""What a set of token weights looks like: statistics over the tokens of a calibration, each a tensor [tokens]."""

import torch
from torch import Tensor

from vlmq_serve.calibrate.samples import MODALITIES

SHARE = 0.1
"""Of all tokens, those that are called the heaviest."""


def ranks(values: Tensor) -> Tensor:
    """float64 ranks from 1; equal values share the mean of theirs, as tokens of one system prompt do."""
    _, position, counts = values.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts.double() - 1) / 2)[position]


def rank_correlation(first: Tensor, second: Tensor) -> float:
    """Spearman's: the correlation of the ranks, in [-1, 1]; NaN where one of them is constant."""
    return float(torch.corrcoef(torch.stack([ranks(first), ranks(second)]))[0, 1])


def spread(values: Tensor) -> float:
    """Standard deviation in units of the mean."""
    return float(values.double().std(correction=0) / values.double().mean())


def heaviest(weights: Tensor) -> Tensor:
    """Indices of the heaviest tenth, at least one."""
    return weights.topk(max(1, round(SHARE * weights.numel()))).indices


def share_of_heaviest(weights: Tensor) -> float:
    """How much of all weight the heaviest tenth holds; 0.1 where all weigh the same."""
    return float(weights[heaviest(weights)].double().sum() / weights.double().sum())


def modalities_of_heaviest(weights: Tensor, modality: Tensor) -> dict[str, float]:
    """Of which modality the heaviest tenth is, as shares that sum to 1."""
    counts = torch.bincount(modality[heaviest(weights)].long(), minlength=len(MODALITIES))
    return dict(zip(MODALITIES, (counts / counts.sum()).tolist(), strict=True))
