"""Group grids: scales and integer zero points, `w = (q - zero) * scale`."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vlmq_serve.format.scheme import Scheme

GridSearch = Literal["minmax", "mse"]
_SHRINK_STEPS = 48
_SMALLEST_SHRINK = 0.3


@dataclass(frozen=True)
class Grid:
    """Scales [..., G] in the checkpoint's dtype and zeros [..., G] (integers in the weight's dtype)."""

    scales: Tensor
    zeros: Tensor


def round_to_grid(weight: Tensor, scales: Tensor, zeros: Tensor, scheme: Scheme) -> Tensor:
    """Nearest codes (in the weight's dtype) of `weight`; scales and zeros broadcast against it."""
    return (torch.round(weight / scales) + zeros).clamp_(0, scheme.max_code)


def fit_grid(weight: Tensor, scheme: Scheme, scale_dtype: torch.dtype, search: GridSearch = "minmax") -> Grid:
    """Grid of groups `weight` [..., L], one scale and zero for each L weights.

    Scales are rounded to `scale_dtype` before zeros and codes are chosen, so that what is stored is what was used.
    `minmax` spans the smallest and the largest weight (and zero); `mse` shrinks that span by the factor in
    [0.3, 1] whose squared rounding error is least.
    """
    low = weight.amin(-1).clamp(max=0)
    high = weight.amax(-1).clamp(min=0)
    if scheme.symmetric:
        high = torch.maximum(-low, high)
        low = -high
    grid = _span_grid(low, high, scheme, scale_dtype)
    return grid if search == "minmax" else _search(weight, low, high, grid, scheme)


def group_weight(weight: Tensor, scheme: Scheme) -> Tensor:
    """View [N, K] as [N, K/G, G]."""
    return weight.reshape(weight.shape[0], scheme.num_groups(weight.shape[1]), -1)


def _span_grid(low: Tensor, high: Tensor, scheme: Scheme, scale_dtype: torch.dtype) -> Grid:
    scales = ((high - low) / scheme.max_code).to(scale_dtype)
    usable = scales.to(low.dtype) > torch.finfo(scale_dtype).tiny
    scales = torch.where(usable, scales, torch.ones_like(scales))
    if scheme.symmetric:
        return Grid(scales, torch.full_like(low, scheme.mid_code))
    return Grid(scales, torch.round(-low / scales.to(low.dtype)).clamp_(0, scheme.max_code))


def _search(weight: Tensor, low: Tensor, high: Tensor, start: Grid, scheme: Scheme) -> Grid:
    scales, zeros = start.scales.clone(), start.zeros.clone()
    best = _squared_error(weight, start, scheme)
    for factor in torch.linspace(1, _SMALLEST_SHRINK, _SHRINK_STEPS)[1:].tolist():
        candidate = _span_grid(low * factor, high * factor, scheme, start.scales.dtype)
        error = _squared_error(weight, candidate, scheme)
        better = error < best
        best = torch.where(better, error, best)
        scales = torch.where(better, candidate.scales, scales)
        zeros = torch.where(better, candidate.zeros, zeros)
    return Grid(scales, zeros)


def _squared_error(weight: Tensor, grid: Grid, scheme: Scheme) -> Tensor:
    scales, zeros = grid.scales.to(weight.dtype)[..., None], grid.zeros[..., None]
    codes = round_to_grid(weight, scales, zeros, scheme)
    return codes.sub_(zeros).mul_(scales).sub_(weight).square_().sum(-1)
