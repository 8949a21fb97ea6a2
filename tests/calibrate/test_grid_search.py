"""Searched grids against every factor tried by hand in float64."""

import pytest
import torch

from vlmq_serve.calibrate.solvers.grid import fit_grid, group_metric, group_weight, round_to_grid
from vlmq_serve.calibrate.solvers.rtn import solve_rtn
from vlmq_serve.calibrate.solvers.solution import SolverOptions
from vlmq_serve.format.scheme import Scheme


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("search", ["mse", "diagonal", "output"])
def test_search_finds_the_best_factor(search, symmetric):
    torch.manual_seed(0)
    scheme = Scheme(2, 32, symmetric)
    weight = torch.randn(5, 64, dtype=torch.float64) * torch.rand(64) ** 3
    inputs = torch.randn(300, 64, dtype=torch.float64) @ torch.randn(64, 64, dtype=torch.float64)
    hessian = inputs.T @ inputs
    groups = group_weight(weight, scheme)
    got = fit_grid(groups, scheme, torch.float32, search, group_metric(hessian, search, 2))
    for row in range(5):
        for group in range(2):
            w = groups[row, group]
            block = hessian[group * 32 : (group + 1) * 32, group * 32 : (group + 1) * 32]
            metric = {"mse": torch.eye(32).double(), "diagonal": block.diagonal().diag(), "output": block}[search]

            def error(scale, zero, w=w, metric=metric):
                code = round_to_grid(w, scale.double(), zero, scheme)
                d = (code - zero) * scale.double() - w
                return float(d @ metric @ d)

            tried = []
            for factor in torch.linspace(1, 0.3, 48).tolist():
                grid = fit_grid((w * factor)[None], scheme, torch.float32)
                tried.append(error(grid.scales[0], grid.zeros[0]))
            assert error(got.scales[row, group], got.zeros[row, group]) == pytest.approx(min(tried), rel=1e-9)
            assert min(tried) < tried[0] or tried[0] == pytest.approx(min(tried))


def test_output_search_lowers_the_output_error_of_rounding():
    torch.manual_seed(0)
    weight = torch.randn(16, 64)
    inputs = torch.randn(500, 64) * torch.linspace(0.1, 3, 64)
    hessian = inputs.T @ inputs / 500
    errors = {}
    for search in ("minmax", "mse", "output"):
        solution = solve_rtn(weight, Scheme(2, -1), SolverOptions(torch.float32, search), hessian)
        errors[search] = float(((solution.dequantize() - weight) @ inputs.T).square().sum())
    assert errors["output"] < 0.95 * errors["mse"] < errors["minmax"]
