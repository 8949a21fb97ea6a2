"""Relative output errors, split by modality."""

import torch
from torch import Tensor

from vlmq_serve.calibrate.samples import MODALITIES

ALL = "all"


class ErrorByModality:
    """Sums of ||y_q - y||^2 and ||y||^2 over tokens of each modality."""

    def __init__(self) -> None:
        self._error = torch.zeros(len(MODALITIES), dtype=torch.float64)
        self._energy = torch.zeros(len(MODALITIES), dtype=torch.float64)

    def add(self, quantized: Tensor, full: Tensor, modality: Tensor) -> None:
        """Outputs [B, T, C] of both paths and modality [B, T]."""
        error = (quantized.float() - full.float()).square().sum(-1)
        self._error += sum_by_modality(error, modality)
        self._energy += sum_by_modality(full.float().square().sum(-1), modality)

    def relative(self) -> dict[str, float]:
        """||y_q - y||^2 / ||y||^2 per modality and under `all`; NaN where there are no such tokens."""
        values = (self._error / self._energy).tolist()
        together = float(self._error.sum() / self._energy.sum())
        return dict(zip(MODALITIES, values, strict=True)) | {ALL: together}


def sum_by_modality(values: Tensor, modality: Tensor) -> Tensor:
    """float64 [3] on the CPU: sums of `values` [B, T] over the tokens of each modality."""
    sums = torch.zeros(len(MODALITIES), dtype=torch.float64, device=values.device)
    sums.index_add_(0, modality.reshape(-1).to(values.device, torch.long), values.reshape(-1).double())
    return sums.cpu()


def mean_by_modality(values: Tensor, modality: Tensor) -> dict[str, float]:
    """Mean of `values` over the tokens of each modality; NaN where there are none."""
    sums = sum_by_modality(values, modality)
    counts = sum_by_modality(torch.ones_like(values), modality)
    return dict(zip(MODALITIES, (sums / counts).tolist(), strict=True))
