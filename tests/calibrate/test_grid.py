import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmq_serve.calibrate.solvers.grid import fit_grid, group_weight
from vlmq_serve.calibrate.solvers.rtn import solve_rtn
from vlmq_serve.calibrate.solvers.solution import SolverOptions
from vlmq_serve.format.scheme import Scheme


@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    symmetric=st.booleans(),
    seed=st.integers(0, 2**16),
    scale=st.sampled_from([1e-4, 0.02, 3.0]),
    shift=st.sampled_from([-2.0, 0.0, 0.3]),
)
@settings(max_examples=60, deadline=None)
def test_rounding_error_is_at_most_half_a_step(bits, symmetric, seed, scale, shift):
    """Within the range, and up to one step at its ends (where the integer zero point cuts it)."""
    weight = scale * (torch.randn(4, 64, generator=torch.Generator().manual_seed(seed)) + shift)
    scheme = Scheme(bits, 32, symmetric)
    packed = solve_rtn(weight, scheme, SolverOptions(torch.float32)).pack()
    step = packed.scales.repeat_interleave(32, 1)
    error = (packed.dequantize() - weight).abs()
    assert (error <= step * 1.001).all()
    codes = packed.codes()
    inside = (codes > 0) & (codes < scheme.max_code)
    assert (error <= step * 0.501)[inside].all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_codes_are_chosen_for_the_rounded_scales(dtype):
    """No other code of the stored grid is nearer to any weight."""
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    scheme = Scheme(4, 32)
    packed = solve_rtn(weight, scheme, SolverOptions(dtype)).pack()
    assert packed.scales.dtype == dtype
    scales = packed.scales.float().repeat_interleave(32, 1)
    zeros = packed.zeros.float().repeat_interleave(32, 1)
    levels = (torch.arange(16.0) - zeros[..., None]) * scales[..., None]
    nearest = (levels - weight[..., None]).abs().amin(-1)
    torch.testing.assert_close((packed.dequantize() - weight).abs(), nearest)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_mse_search_is_never_worse_and_better_with_outliers(bits, symmetric):
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(16, 64, generator=generator)
    weight[:, ::32] *= 6
    scheme = Scheme(bits, 32, symmetric)
    errors = [
        (solve_rtn(weight, scheme, SolverOptions(torch.bfloat16, search)).pack().dequantize() - weight).square()
        for search in ("minmax", "mse")
    ]
    per_group = [error.reshape(16, 2, 32).sum(-1) for error in errors]
    assert (per_group[1] <= per_group[0] * (1 + 1e-6)).all()
    assert errors[1].sum() < 0.95 * errors[0].sum()


def test_constant_and_zero_groups_survive():
    weight = torch.zeros(3, 32)
    weight[1] = 0.5
    weight[2] = -0.25
    packed = solve_rtn(weight, Scheme(2, 32), SolverOptions(torch.bfloat16)).pack()
    torch.testing.assert_close(packed.dequantize(), weight, rtol=0.01, atol=0)


def test_grid_shapes_and_integer_zeros():
    weight = torch.randn(5, 128)
    grid = fit_grid(group_weight(weight, Scheme(3, 64)), Scheme(3, 64), torch.bfloat16)
    assert grid.scales.shape == grid.zeros.shape == (5, 2)
    assert torch.equal(grid.zeros, grid.zeros.round())
    assert grid.zeros.min() >= 0
    assert grid.zeros.max() <= 7
