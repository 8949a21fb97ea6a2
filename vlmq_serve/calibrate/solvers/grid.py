"""Group grids: scales and integer zero points, `w = (q - zero) * scale`."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vlmq_serve.format.scheme import Scheme

GridSearch = Literal["minmax", "mse", "diagonal", "output", "percentile"]
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


def fit_grid(
    weight: Tensor,
    scheme: Scheme,
    scale_dtype: torch.dtype,
    search: GridSearch = "minmax",
    metric: Tensor | None = None,
    percentile: float = 1.0,
) -> Grid:
    """Grid of groups `weight` [N, ..., L], one scale and zero for each L weights.

    Scales are rounded to `scale_dtype` before zeros and codes are chosen, so that what is stored is what was used.
    `minmax` spans the smallest and the largest weight (and zero). The others shrink that span by the factor in
    [0.3, 1] of least error of the rounded group, d = q - w: `mse` d^T d, `diagonal` d^T diag(H) d with `metric`
    diag(H) [..., L], `output` d^T H d with `metric` H [..., L, L], which is the squared error of the group's outputs.
    `percentile` spans the quantiles 1 - p and p of the group, p = `percentile`, as Q-VLM searches them.
    """
    low, high = weight.amin(-1), weight.amax(-1)
    if search == "percentile" and percentile < 1:
        low, high = _quantile(weight, 1 - percentile), _quantile(weight, percentile)
    low, high = low.clamp(max=0), high.clamp(min=0)
    if scheme.symmetric:
        high = torch.maximum(-low, high)
        low = -high
    grid = _span_grid(low, high, scheme, scale_dtype)
    return grid if search in ("minmax", "percentile") else _search(weight, low, high, grid, scheme, metric)


def group_weight(weight: Tensor, scheme: Scheme) -> Tensor:
    """View [N, K] as [N, K/G, G]."""
    return weight.reshape(weight.shape[0], scheme.num_groups(weight.shape[1]), -1)


def _quantile(weight: Tensor, level: float) -> Tensor:
    """Quantile over the last dimension of [N, ..., L]; torch takes 2^24 elements at once."""
    rows = max(2**24 // max(weight[0].numel(), 1), 1)
    return torch.cat([part.quantile(level, -1) for part in weight.split(rows)])


def _span_grid(low: Tensor, high: Tensor, scheme: Scheme, scale_dtype: torch.dtype) -> Grid:
    scales = ((high - low) / scheme.max_code).to(scale_dtype)
    usable = scales.to(low.dtype) > torch.finfo(scale_dtype).tiny
    scales = torch.where(usable, scales, torch.ones_like(scales))
    if scheme.symmetric:
        return Grid(scales, torch.full_like(low, scheme.mid_code))
    return Grid(scales, torch.round(-low / scales.to(low.dtype)).clamp_(0, scheme.max_code))


def group_metric(hessian: Tensor | None, search: GridSearch, groups: int) -> Tensor | None:
    """What `fit_grid` needs of a Hessian [K, K] for all groups: [G, L] or [G, L, L]; None where it needs nothing."""
    if search not in ("diagonal", "output"):
        return None
    if hessian is None:
        raise RuntimeError(f"grid {search} needs a Hessian")
    if search == "diagonal":
        return hessian.diagonal().reshape(groups, -1)
    length = hessian.shape[0] // groups
    index = torch.arange(groups, device=hessian.device)
    return hessian.reshape(groups, length, groups, length)[index, :, index]


def _search(weight: Tensor, low: Tensor, high: Tensor, start: Grid, scheme: Scheme, metric: Tensor | None) -> Grid:
    scales, zeros = start.scales.clone(), start.zeros.clone()
    best = _squared_error(weight, start, scheme, metric)
    for factor in torch.linspace(1, _SMALLEST_SHRINK, _SHRINK_STEPS)[1:].tolist():
        candidate = _span_grid(low * factor, high * factor, scheme, start.scales.dtype)
        error = _squared_error(weight, candidate, scheme, metric)
        better = error < best
        best = torch.where(better, error, best)
        scales = torch.where(better, candidate.scales, scales)
        zeros = torch.where(better, candidate.zeros, zeros)
    return Grid(scales, zeros)


def _squared_error(weight: Tensor, grid: Grid, scheme: Scheme, metric: Tensor | None) -> Tensor:
    scales, zeros = grid.scales.to(weight.dtype)[..., None], grid.zeros[..., None]
    codes = round_to_grid(weight, scales, zeros, scheme)
    difference = codes.sub_(zeros).mul_(scales).sub_(weight)
    if metric is None:
        return difference.square_().sum(-1)
    if metric.dim() == weight.dim() - 1:
        return (difference.square_() * metric).sum(-1)
    rows = difference.movedim(0, -2)
    return ((rows @ metric) * rows).sum(-1).movedim(-1, 0)
