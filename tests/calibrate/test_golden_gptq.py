"""GPTQ's codes are those of llm-compressor, code for code; `golden_gptq.py` says how they were made."""

import json

import pytest
import torch

from tests.calibrate.golden_gptq import CASES, COLUMNS, GOLDEN, PERCDAMP, layer
from vlmq_serve.calibrate.hessian import Statistics
from vlmq_serve.calibrate.solvers.factor import factor_inverse
from vlmq_serve.calibrate.solvers.gptq import _Sweep, solve_gptq
from vlmq_serve.calibrate.solvers.grid import fit_grid, group_weight
from vlmq_serve.calibrate.solvers.solution import SolverOptions
from vlmq_serve.format.scheme import Scheme


@pytest.mark.parametrize(("text", "act"), CASES)
def test_same_codes(text, act):
    scheme, (weight, hessian) = Scheme.parse(text), layer()
    options = SolverOptions(torch.bfloat16, percdamp=PERCDAMP, act_order=bool(act))
    expected = [[int(digit, 16) for digit in row] for row in json.loads(GOLDEN.read_text())[f"{text} act_order={act}"]]
    if act:
        codes = solve_gptq(weight, Statistics(hessian, None, 1), scheme, options).codes
    else:
        # llm-compressor fixes grids before the sweep; without act_order ours fits each group on the way.
        factor = factor_inverse(hessian, PERCDAMP, False)
        fixed = SolverOptions(torch.bfloat16, percdamp=PERCDAMP, act_order=True)
        sweep = _Sweep(weight, torch.arange(COLUMNS), scheme, fixed, None)
        sweep.set_grid(fit_grid(group_weight(weight, scheme), scheme, torch.bfloat16))
        sweep.run(factor.upper, None)
        codes = sweep.codes
    assert codes.int().tolist() == expected
