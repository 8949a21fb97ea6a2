"""What each step of the solver minimises, against weighted least squares on the tokens themselves, in float64."""

import pytest
import torch
from torch import Tensor

from vlmq_serve.calibrate.hessian import StatisticsAccumulator
from vlmq_serve.calibrate.solvers.factor import factor_inverse
from vlmq_serve.calibrate.solvers.gptaq import residual_correction

COLUMNS, TOKENS, PERCDAMP = 12, 60, 0.01


@pytest.fixture(params=[False, True], ids=["equal weights", "token weights"])
def case(request):
    """Inputs f and u [T, K], weights l [T], and the damping in units of the sum over tokens."""
    torch.manual_seed(0)
    full = torch.randn(TOKENS, COLUMNS, dtype=torch.float64) @ torch.randn(COLUMNS, COLUMNS, dtype=torch.float64)
    quantized = full + 0.3 * torch.randn_like(full)
    weights = torch.rand(TOKENS, dtype=torch.float64) ** 4 if request.param else torch.ones(TOKENS, dtype=torch.float64)
    weights = weights / weights.mean()
    power = (weights[:, None] * quantized.square()).sum(0).mean()
    return full, quantized, weights, PERCDAMP * power


def least_squares(inputs: Tensor, target: Tensor, weights: Tensor, damping: Tensor) -> Tensor:
    """argmin_d sum_t l_t (d . x_t - y_t)^2 + damping |d|^2, from the tokens: no Hessian anywhere."""
    rows = torch.cat([weights.sqrt()[:, None] * inputs, damping.sqrt() * torch.eye(inputs.shape[1]).double()])
    wanted = torch.cat([weights.sqrt() * target, torch.zeros(inputs.shape[1]).double()])
    return torch.linalg.lstsq(rows, wanted[:, None]).solution[:, 0]


def statistics(full: Tensor, quantized: Tensor, weights: Tensor):
    sums = StatisticsAccumulator(COLUMNS, True, torch.device("cpu"), torch.float64)
    sums.add(quantized, full, weights)
    return sums.finish()


@pytest.mark.parametrize("act_order", [False, True])
def test_the_columns_left_make_up_for_a_rounding_error_as_well_as_they_can(case, act_order):
    full, quantized, weights, damping = case
    factor = factor_inverse(statistics(full, quantized, weights).hessian, PERCDAMP, act_order)
    order = factor.order
    for i in range(COLUMNS - 1):
        error = 0.7  # w - q of column i
        step = -error / factor.upper[i, i] * factor.upper[i, i + 1 :]
        left = quantized[:, order[i + 1 :]]
        # The outputs lose error * u_i; the step of the columns left has to bring it back.
        wanted = least_squares(left, error * quantized[:, order[i]], weights, damping)
        torch.testing.assert_close(step, wanted, rtol=1e-6, atol=1e-8)


def test_the_residual_term_is_the_best_answer_to_the_drift_of_a_column(case):
    """w_q P_q brings the free columns' outputs closest to w_q (f_q - u_q), with the same token weights."""
    full, quantized, weights, damping = case
    stats = statistics(full, quantized, weights)
    factor = factor_inverse(stats.hessian, PERCDAMP, False)
    assert stats.residual is not None
    correction = residual_correction(stats.residual, factor.upper, alpha=1.0)
    for q in range(COLUMNS - 1):
        wanted = least_squares(quantized[:, q + 1 :], full[:, q] - quantized[:, q], weights, damping)
        torch.testing.assert_close(correction[q, q + 1 :], wanted, rtol=1e-6, atol=1e-8)
    assert torch.equal(correction.tril(), torch.zeros_like(correction))
