"""GPTQ (Frantar et al., ICLR 2023) with an optional asymmetric residual term, blocked.

Column by column, the rounding error of column i goes to the columns after it:

    e = (w_i - q_i) / U_ii        w_j -= e U_ij - w_i P_ij    for j > i

with H^-1 = U^T U and P from `gptaq.residual_correction` (zero for GPTQ).
"""

import torch
from torch import Tensor

from vlmq_serve.calibrate.hessian import Statistics
from vlmq_serve.calibrate.solvers.factor import InverseFactor, factor_inverse
from vlmq_serve.calibrate.solvers.gptaq import residual_correction
from vlmq_serve.calibrate.solvers.grid import Grid, fit_grid, group_metric, group_weight, round_to_grid
from vlmq_serve.calibrate.solvers.solution import Solution, SolverOptions
from vlmq_serve.format.scheme import Scheme


def solve_gptq(
    weight: Tensor,
    statistics: Statistics,
    scheme: Scheme,
    options: SolverOptions,
    use_residual: bool = False,
    factor: InverseFactor | None = None,
) -> Solution:
    """Codes of `weight` [N, K] that keep its outputs on the inputs behind `statistics`.

    With `act_order` columns go by falling Hessian diagonal and each group's grid is fixed from the original weights
    before the columns are permuted (the checkpoint has no g_idx). Without it a group's grid is fitted when its first
    column is reached, to weights that carry the compensation of all columns before. `factor` may be passed where
    several weights share `statistics`.
    """
    factor = factor or factor_inverse(statistics.hessian, options.percdamp, options.act_order)
    order = factor.order
    correction = None
    if use_residual:
        if statistics.residual is None:
            raise RuntimeError("use_residual needs statistics with a residual")
        correction = residual_correction(statistics.residual[order][:, order], factor.upper, options.alpha)
    metric = group_metric(statistics.hessian, options.grid, scheme.num_groups(weight.shape[1]))
    sweep = _Sweep(weight[:, order], order, scheme, options, metric)
    if options.act_order:
        sweep.set_grid(fit_grid(group_weight(weight, scheme), scheme, options.scale_dtype, options.grid, metric))
    sweep.run(factor.upper, correction)
    codes = torch.empty_like(sweep.codes)
    codes[:, order] = sweep.codes
    return Solution(codes, Grid(sweep.scales, sweep.zeros), scheme, factor.damping)


class _Sweep:
    """State of one pass over the columns of a weight whose columns are already in processing order."""

    def __init__(
        self, weight: Tensor, order: Tensor, scheme: Scheme, options: SolverOptions, metric: Tensor | None
    ) -> None:
        rows, columns = weight.shape
        groups = scheme.num_groups(columns)
        self.weight = weight.clone()
        self.codes = torch.zeros_like(weight)
        self.scheme, self.options, self.metric = scheme, options, metric
        self.length = columns // groups
        self.group_of = (order // self.length).tolist()
        self.scales = torch.ones(rows, groups, dtype=options.scale_dtype, device=weight.device)
        self.zeros = torch.zeros(rows, groups, dtype=weight.dtype, device=weight.device)

    def set_grid(self, grid: Grid) -> None:
        self.scales, self.zeros = grid.scales, grid.zeros

    def run(self, upper: Tensor, correction: Tensor | None) -> None:
        columns = self.weight.shape[1]
        # A group fitted on the way must lie in one block: columns beyond the block have not been updated yet.
        block = max(self.options.block_size, 0 if self.length == columns else self.length)
        for start in range(0, columns, block):
            stop = min(start + block, columns)
            errors, originals = self._run_block(start, stop, upper, correction)
            self.weight[:, stop:] -= errors @ upper[start:stop, stop:]
            if correction is not None:
                self.weight[:, stop:] += originals @ correction[start:stop, stop:]

    def _run_block(self, start: int, stop: int, upper: Tensor, correction: Tensor | None) -> tuple[Tensor, Tensor]:
        """Quantize columns [start, stop); returns their scaled errors and the values they had when rounded."""
        block = self.weight[:, start:stop]
        errors = torch.empty_like(block)
        originals = torch.empty_like(block)
        diagonal = upper.diagonal()[start:stop].tolist()
        for i in range(stop - start):
            group = self.group_of[start + i]
            if not self.options.act_order and (start + i) % self.length == 0:
                self._fit_group(group, start + i)
            column = block[:, i]
            scale, zero = self.scales[:, group].to(column.dtype), self.zeros[:, group]
            code = round_to_grid(column, scale, zero, self.scheme)
            originals[:, i] = column
            errors[:, i] = (column - (code - zero) * scale) / diagonal[i]
            self.codes[:, start + i] = code
            rest = block[:, i + 1 :]
            rest.addr_(errors[:, i], upper[start + i, start + i + 1 : stop], alpha=-1)
            if correction is not None:
                rest.addr_(originals[:, i], correction[start + i, start + i + 1 : stop])
        return errors, originals

    def _fit_group(self, group: int, first: int) -> None:
        columns = self.weight[:, first : first + self.length]
        metric = None if self.metric is None else self.metric[group]
        grid = fit_grid(columns, self.scheme, self.options.scale_dtype, self.options.grid, metric)
        self.scales[:, group], self.zeros[:, group] = grid.scales, grid.zeros
