"""Solvers against float64 brute force that uses explicit inverses."""

import pytest
import torch
from torch import Tensor

from vlmq_serve.calibrate.hessian import Statistics, StatisticsAccumulator
from vlmq_serve.calibrate.solvers.factor import factor_inverse
from vlmq_serve.calibrate.solvers.gptq import solve_gptq
from vlmq_serve.calibrate.solvers.grid import fit_grid, group_weight, round_to_grid
from vlmq_serve.calibrate.solvers.rtn import solve_rtn
from vlmq_serve.calibrate.solvers.solution import Solution, SolverOptions
from vlmq_serve.format.errors import VLMQError
from vlmq_serve.format.scheme import Scheme

OPTIONS = SolverOptions(torch.float32, percdamp=0.01)


def random_case(seed: int, rows: int = 8, columns: int = 64, tokens: int = 200, drift: float = 0.3):
    """Weight, correlated inputs of both paths and token weights, all float64."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator, dtype=torch.float64) / columns**0.5
    full = torch.randn(tokens, columns, generator=generator, dtype=torch.float64) @ mix
    full += 0.5 * full[:, :1]
    change = torch.randn(columns, columns, generator=generator, dtype=torch.float64) / columns**0.5
    quantized = full + drift * full @ change
    weight = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    weights = torch.rand(tokens, generator=generator, dtype=torch.float64) ** 4
    return weight, full, quantized, weights / weights.mean()


def statistics_of(quantized: Tensor, full: Tensor | None = None, weights: Tensor | None = None) -> Statistics:
    sums = StatisticsAccumulator(quantized.shape[1], full is not None, torch.device("cpu"), torch.float64)
    sums.add(quantized, full, weights)
    return sums.finish()


def dequantize(solution: Solution) -> Tensor:
    columns = solution.codes.shape[1]
    length = columns // solution.grid.scales.shape[1]
    scales = solution.grid.scales.double().repeat_interleave(length, 1)
    return (solution.codes.double() - solution.grid.zeros.double().repeat_interleave(length, 1)) * scales


def brute_force(weight: Tensor, statistics: Statistics, scheme: Scheme, options: SolverOptions, alpha: float) -> Tensor:
    """Codes by the textbook: after each column the rest moves by the closed form with freshly inverted matrices."""
    hessian = statistics.hessian + options.percdamp * statistics.hessian.diagonal().mean() * torch.eye(weight.shape[1])
    groups = scheme.num_groups(weight.shape[1])
    length = weight.shape[1] // groups
    order = list(range(weight.shape[1]))
    if options.act_order:
        order = torch.argsort(statistics.hessian.diagonal(), descending=True, stable=True).tolist()
    static = fit_grid(group_weight(weight, scheme), scheme, options.scale_dtype, options.grid)
    scales, zeros = static.scales.double(), static.zeros.clone()
    current, codes = weight.clone(), torch.zeros_like(weight)
    for step, column in enumerate(order):
        group = column // length
        if not options.act_order and column % length == 0:
            grid = fit_grid(current[:, column : column + length], scheme, options.scale_dtype, options.grid)
            scales[:, group], zeros[:, group] = grid.scales.double(), grid.zeros
        value = current[:, column].clone()
        code = round_to_grid(value, scales[:, group], zeros[:, group], scheme)
        codes[:, column] = code
        rounded = (code - zeros[:, group]) * scales[:, group]
        left, rest = order[step:], order[step + 1 :]
        if rest:
            inverse = torch.linalg.inv(hessian[left][:, left])
            current[:, rest] += ((rounded - value) / inverse[0, 0])[:, None] * inverse[0, 1:]
            if alpha and statistics.residual is not None:
                push = alpha * statistics.residual[column, rest] @ torch.linalg.inv(hessian[rest][:, rest])
                current[:, rest] += value[:, None] * push
    return codes


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("group_size", [32, -1])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
def test_gptq_equals_sequential_obq(bits, group_size, act_order, symmetric):
    weight, _, quantized, _ = random_case(bits)
    scheme = Scheme(bits, group_size, symmetric)
    options = SolverOptions(torch.float32, act_order=act_order, block_size=32)
    statistics = statistics_of(quantized)
    solution = solve_gptq(weight, statistics, scheme, options)
    assert torch.equal(solution.codes, brute_force(weight, statistics, scheme, options, alpha=0))


@pytest.mark.parametrize("alpha", [0.25, 1.0])
@pytest.mark.parametrize("act_order", [False, True])
def test_gptaq_equals_brute_force_with_weights(alpha, act_order):
    weight, full, quantized, weights = random_case(7)
    options = SolverOptions(torch.float32, act_order=act_order, alpha=alpha, block_size=32)
    statistics = statistics_of(quantized, full, weights)
    scheme = Scheme(3, 32)
    solution = solve_gptq(weight, statistics, scheme, options, use_residual=True)
    assert torch.equal(solution.codes, brute_force(weight, statistics, scheme, options, alpha))


def test_blocks_do_not_matter():
    weight, full, quantized, _ = random_case(3, columns=256, tokens=600)
    statistics = statistics_of(quantized, full)
    codes = [
        solve_gptq(weight, statistics, Scheme(3, 64), SolverOptions(torch.float32, block_size=size), True).codes
        for size in (64, 128, 256)
    ]
    assert torch.equal(codes[0], codes[1])
    assert torch.equal(codes[0], codes[2])


def test_statistics_match_their_definition():
    _, full, quantized, weights = random_case(1)
    got = statistics_of(quantized, full, weights)
    hessian = quantized.T @ torch.diag(weights) @ quantized / len(weights)
    residual = (full - quantized).T @ torch.diag(weights) @ quantized / len(weights)
    torch.testing.assert_close(got.hessian, hessian)
    torch.testing.assert_close(got.residual, residual)


def test_statistics_do_not_depend_on_batches():
    _, full, quantized, weights = random_case(1)
    sums = StatisticsAccumulator(quantized.shape[1], True, torch.device("cpu"), torch.float64)
    for part in (slice(0, 50), slice(50, 200)):
        sums.add(quantized[part][None], full[part][None], weights[part][None])
    torch.testing.assert_close(sums.finish().residual, statistics_of(quantized, full, weights).residual)


def test_gptaq_without_drift_equals_gptq():
    weight, full, _, _ = random_case(2)
    statistics = statistics_of(full, full)
    with_residual = solve_gptq(weight, statistics, Scheme(3, 32), OPTIONS, use_residual=True)
    assert torch.equal(with_residual.codes, solve_gptq(weight, statistics, Scheme(3, 32), OPTIONS).codes)


@pytest.mark.parametrize("act_order", [False, True])
def test_diagonal_hessian_is_rounding(act_order):
    weight = random_case(4)[0]
    options = SolverOptions(torch.float32, act_order=act_order)
    statistics = Statistics(torch.diag(torch.rand(64, dtype=torch.float64) + 0.1), None, 1)
    solution = solve_gptq(weight, statistics, Scheme(3, 32), options)
    assert torch.equal(solution.codes, solve_rtn(weight, Scheme(3, 32), options).codes)


def test_global_rescale_of_token_weights_changes_nothing():
    weight, full, quantized, weights = random_case(5)
    codes = [
        solve_gptq(weight, statistics_of(quantized, full, weights * factor), Scheme(2, 32), OPTIONS, True).codes
        for factor in (1.0, 2.0**-20)
    ]
    assert torch.equal(codes[0], codes[1])


def test_weighted_hessian_lowers_the_weighted_error():
    """On held-out tokens of the same kinds: kind A weighs 20 times kind B and lives in another subspace."""
    generator = torch.Generator().manual_seed(0)
    scales = torch.rand(2, 1, 64, generator=generator, dtype=torch.float64) ** 3
    mixes = torch.randn(2, 64, 64, generator=generator, dtype=torch.float64) * scales

    def tokens(count: int) -> tuple[Tensor, Tensor]:
        kinds = torch.randn(2, count, 64, generator=generator, dtype=torch.float64) @ mixes
        weights = torch.tensor([20.0, 1.0], dtype=torch.float64).repeat_interleave(count)
        return kinds.reshape(-1, 64), weights / weights.mean()

    calibration, weights = tokens(400)
    held_out, held_weights = tokens(2000)
    weight = torch.randn(32, 64, generator=generator, dtype=torch.float64)
    errors = {}
    for name, chosen in (("weighted", weights), ("plain", None)):
        solution = solve_gptq(weight, statistics_of(calibration, None, chosen), Scheme(2, 32), OPTIONS)
        error = ((dequantize(solution) - weight) @ held_out.T).square().sum(0)
        errors[name] = float((error * held_weights).sum()), float(error.sum())
    # 0.80 to 0.93 over ten seeds.
    assert errors["weighted"][0] < 0.95 * errors["plain"][0]
    assert errors["weighted"][1] > errors["plain"][1]


def test_residual_brings_outputs_closer_to_the_full_path():
    weight, full, quantized, _ = random_case(6, tokens=2000)
    target = weight @ full.T
    statistics = statistics_of(quantized, full)
    errors = [
        float((dequantize(solve_gptq(weight, statistics, Scheme(4, 32), OPTIONS, on)) @ quantized.T - target).norm())
        for on in (False, True)
    ]
    assert errors[1] < 0.95 * errors[0]


def test_unused_columns_are_rounded_and_disturb_nothing():
    weight, _, quantized, _ = random_case(8)
    quantized[:, 10] = 0
    options = SolverOptions(torch.float32, act_order=True)
    solution = solve_gptq(weight, statistics_of(quantized), Scheme(3, 32), options)
    assert torch.equal(solution.codes[:, 10], solve_rtn(weight, Scheme(3, 32), options).codes[:, 10])


def test_damping_grows_until_the_factor_exists():
    columns = torch.randn(4, 64)
    hessian = columns.T @ columns  # rank 4, and rounding makes its smallest eigenvalues negative
    factor = factor_inverse(hessian, 1e-9, act_order=False)
    assert factor.damping > 1e-9
    assert torch.isfinite(factor.upper).all()


def test_factor_is_that_of_the_inverse():
    hessian = statistics_of(random_case(9)[1]).hessian
    factor = factor_inverse(hessian, 0.01, act_order=True)
    ordered = hessian[factor.order][:, factor.order] + 0.01 * hessian.diagonal().mean() * torch.eye(64)
    torch.testing.assert_close(factor.upper.T @ factor.upper, torch.linalg.inv(ordered))
    assert torch.equal(factor.upper, factor.upper.triu())


def test_nan_in_the_hessian_is_one_clear_error():
    hessian = torch.eye(32)
    hessian[3, 4] = float("nan")
    with pytest.raises(VLMQError, match="NaN or infinity"):
        factor_inverse(hessian, 0.01, act_order=False)
