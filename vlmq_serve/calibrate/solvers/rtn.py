"""Round to nearest: no calibration data."""

from torch import Tensor

from vlmq_serve.calibrate.solvers.grid import fit_grid, group_weight, round_to_grid
from vlmq_serve.calibrate.solvers.solution import Solution, SolverOptions
from vlmq_serve.format.scheme import Scheme


def solve_rtn(weight: Tensor, scheme: Scheme, options: SolverOptions) -> Solution:
    """Nearest codes of `weight` [N, K] on the grid of each group."""
    groups = group_weight(weight, scheme)
    grid = fit_grid(groups, scheme, options.scale_dtype, options.grid)
    scales = grid.scales.to(weight.dtype)[..., None]
    codes = round_to_grid(groups, scales, grid.zeros[..., None], scheme)
    return Solution(codes.reshape(weight.shape), grid, scheme)
