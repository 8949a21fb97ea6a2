"""Round to nearest: no calibration data, unless the search of the grid asks for it."""

from torch import Tensor

from vlmq_serve.calibrate.solvers.grid import fit_grid, group_metric, group_weight, round_to_grid
from vlmq_serve.calibrate.solvers.solution import Solution, SolverOptions
from vlmq_serve.format.scheme import Scheme


def solve_rtn(weight: Tensor, scheme: Scheme, options: SolverOptions, hessian: Tensor | None = None) -> Solution:
    """Nearest codes of `weight` [N, K] on the grid of each group; `hessian` [K, K] where the grid's search needs it."""
    groups = group_weight(weight, scheme)
    metric = group_metric(hessian, options.grid, groups.shape[1])
    grid = fit_grid(groups, scheme, options.scale_dtype, options.grid, metric, options.percentile)
    scales = grid.scales.to(weight.dtype)[..., None]
    codes = round_to_grid(groups, scales, grid.zeros[..., None], scheme)
    return Solution(codes.reshape(weight.shape), grid, scheme)
