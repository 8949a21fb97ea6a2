"""Search of channel scales, block by block: AWQ (Lin et al., MLSys 2024), MBQ (Li et al., CVPR 2025) and TLQ.

For linears that read x, with xbar_c the mean magnitude of channel c and r = 0, 1/20 ... 19/20:

    s(r) = xbar^r, divided by sqrt(max s * min s)
    r*   = argmin_r sum_t l_t sum_c | B_r(X) - B(F) |^p_tc

B is the residual block with its original weights, B_r has the readers' weights W replaced by Q(W diag(s)) diag(s)^-1,
Q rounds to nearest. AWQ: p = 2, l = 1. MBQ: p = 1, l by modality. TLQ: p = 2, l of the token-level set.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vlmq_serve.calibrate.activations import InputQuantizer, quantized_inputs
from vlmq_serve.calibrate.capture import linear_input
from vlmq_serve.calibrate.families.adapter import Producer, ResidualBlock
from vlmq_serve.calibrate.folding import Folded, fold, producer_rows
from vlmq_serve.calibrate.linear_plan import LinearPlan
from vlmq_serve.calibrate.simulation import ActivationScheme
from vlmq_serve.calibrate.solvers.rtn import solve_rtn
from vlmq_serve.calibrate.solvers.solution import SolverOptions
from vlmq_serve.calibrate.streams import Streams
from vlmq_serve.format.scheme import Scheme

RATIOS = 20
_SMALLEST = 1e-4


@dataclass(frozen=True)
class TokenError:
    """`sum_t l_t sum_c |difference|^power`; `weights` l, fp32 [B, T] per batch, none: all 1.

    `weighted_statistic`: the channels' mean magnitude is taken with these weights too.
    """

    power: int = 2
    weights: Sequence[Tensor] | None = None
    weighted_statistic: bool = False

    def measure(self, difference: Tensor, position: int) -> float:
        """Error of one batch, difference [B, T, C]."""
        tokens = difference.float().abs().pow(self.power).sum(-1)
        if self.weights is not None:
            tokens = tokens * self.weights[position].to(tokens)
        return float(tokens.double().sum())


@dataclass(frozen=True)
class ChannelSearch:
    """How scales are judged. `exposed`: X is the quantized path's input of the block, else that of the full path.

    With simulated `activations` the linears whose scales are tried read Q(x / s) s; static ranges are taken from the
    batch at hand here, since those of the linear are not known before its scales.
    """

    error: TokenError
    options: SolverOptions
    exposed: bool
    activations: ActivationScheme | None = None


def equalize_block(
    layer: nn.Module,
    full: nn.Module,
    block: ResidualBlock,
    linears: Mapping[str, LinearPlan],
    streams: Streams,
    search: ChannelSearch,
) -> Folded:
    """Find and fold the scales of all groups of the block; norms and biases of `layer` change at once.

    A group is left alone where one of its linears or the linear before it is not quantized: their dense weights stay
    as they are in the source.
    """
    folded = Folded()
    targets = [block.forward(full, item.full, item.kwargs).cpu() for item in streams]
    for group, producer in zip(block.linear_groups, block.producers, strict=True):
        plans = [linears[name] for name in group]
        before = linears.get(producer.module) if producer else None
        if producer is None or any(p.scheme is None for p in plans) or (before and before.scheme is None):
            continue
        scales = _search_group(full, block, plans, producer, streams, targets, search)
        fold(layer, producer, {plan.local: plan.dtype for plan in plans}, scales, folded)
    return folded


def candidate_scales(magnitude: Tensor, ratio: float) -> Tensor:
    """s = xbar^ratio, fp32 [K], with sqrt(max * min) = 1."""
    scales = magnitude.pow(ratio).clamp(min=_SMALLEST)
    return scales / (scales.max() * scales.min()).sqrt()


def scaled_rounding(weight: Tensor, scales: Tensor, scheme: Scheme, options: SolverOptions) -> Tensor:
    """Q(W diag(s)) diag(s)^-1, fp32 [N, K]."""
    return solve_rtn(weight * scales, scheme, options).dequantize() / scales


def _search_group(
    full: nn.Module,
    block: ResidualBlock,
    plans: Sequence[LinearPlan],
    producer: Producer,
    streams: Streams,
    targets: Sequence[Tensor],
    search: ChannelSearch,
) -> Tensor:
    """The scales [K] of least error for linears with one input."""
    width = full.get_parameter(f"{producer.module}.weight").shape[0]
    rows = producer_rows(width, plans[0].shape[1], producer.head_dim and producer.head_dim(full))
    magnitude = _share(_mean_magnitude(full, block, plans[0].local, streams, search), rows, width)
    trial = copy.deepcopy(full)
    best, found = float("inf"), torch.ones_like(magnitude)
    for step in range(RATIOS):
        scales = candidate_scales(magnitude, step / RATIOS)
        for plan in plans:
            assert plan.scheme is not None  # the caller has seen to it
            weight = full.get_parameter(f"{plan.local}.weight").detach().float()
            rounded = scaled_rounding(weight, scales, plan.scheme, search.options)
            trial.get_parameter(f"{plan.local}.weight").data.copy_(rounded)
        error = 0.0
        inputs = {}
        if search.activations is not None:
            inputs = {plan.local: InputQuantizer(search.activations, scales=scales) for plan in plans}
        with quantized_inputs(trial, inputs):
            for item in streams:
                output = block.forward(trial, item.quantized if search.exposed else item.full, item.kwargs)
                error += search.error.measure(output - targets[item.position].to(output), item.position)
        if error < best:
            best, found = error, scales
    return found


def _mean_magnitude(
    full: nn.Module, block: ResidualBlock, linear: str, streams: Streams, search: ChannelSearch
) -> Tensor:
    """Mean |x| per input channel, fp32 [K]."""
    total, count = torch.zeros(()), 0.0
    for item in streams:
        hidden = item.quantized if search.exposed else item.full
        x = linear_input(full, block.forward, linear, hidden, item.kwargs).float().abs()
        if search.error.weighted_statistic and search.error.weights is not None:
            weights = search.error.weights[item.position].to(x)
            total, count = total.to(x) + (x * weights[..., None]).sum((0, 1)), count + float(weights.sum())
        else:
            total, count = total.to(x) + x.sum((0, 1)), count + x.shape[0] * x.shape[1]
    return total / count


def _share(magnitude: Tensor, rows: Tensor, width: int) -> Tensor:
    """Channels that one row of the producer makes get the mean of their magnitudes."""
    if width == magnitude.shape[0]:
        return magnitude
    rows = rows.to(magnitude.device)
    sums = torch.zeros(width, device=magnitude.device).index_add_(0, rows, magnitude)
    return (sums / torch.bincount(rows, minlength=width))[rows]
