"""One linear: which solver with which options, and how its result is written back."""

from dataclasses import dataclass

from torch import Tensor, nn

from vlmq_serve.calibrate.hessian import Statistics
from vlmq_serve.calibrate.linear_plan import LinearPlan
from vlmq_serve.calibrate.recipe import Recipe
from vlmq_serve.calibrate.solvers.factor import InverseFactor, factor_inverse
from vlmq_serve.calibrate.solvers.gptq import solve_gptq
from vlmq_serve.calibrate.solvers.rtn import solve_rtn
from vlmq_serve.calibrate.solvers.solution import Solution, SolverOptions
from vlmq_serve.format.errors import VLMQError
from vlmq_serve.format.weight import PackedWeight


@dataclass(frozen=True)
class Clipping:
    """Percentiles at which Q-VLM cuts the ranges of a layer's weights and of what its linears read."""

    weights: float = 1.0
    activations: float = 1.0


def solve(
    plan: LinearPlan,
    weight: Tensor,
    recipe: Recipe,
    statistics: Statistics | None,
    factors: dict[int, InverseFactor],
    clipping: Clipping | None = None,
) -> Solution:
    """Run the recipe's solver on one weight [N, K] (fp32); `factors` keeps what linears with one Hessian share.

    `clipping` is what Q-VLM has found for the layer.
    """
    if plan.scheme is None:
        raise RuntimeError(f"{plan.name} is not to be quantized")
    options = SolverOptions(plan.stored_dtype, recipe.grid, recipe.percdamp, recipe.act_order, recipe.alpha)
    if clipping is not None:
        options = SolverOptions(plan.stored_dtype, "percentile", percentile=clipping.weights)
        return solve_rtn(weight, plan.scheme, options)
    solver = recipe.solver(plan.scheme.bits)
    if solver == "rtn":
        return solve_rtn(weight, plan.scheme, options, statistics.hessian if statistics else None)
    if statistics is None:
        raise RuntimeError(f"{plan.name}: {solver} needs statistics")
    try:
        if id(statistics) not in factors:
            factors[id(statistics)] = factor_inverse(statistics.hessian, options.percdamp, options.act_order)
    except VLMQError as error:
        raise VLMQError(f"{plan.name}: {error}") from None
    return solve_gptq(weight, statistics, plan.scheme, options, solver == "gptaq", factors[id(statistics)])


def write_weight(layer: nn.Module, plan: LinearPlan, packed: PackedWeight) -> None:
    """Put the dequantized weight into the layer, in its own dtype."""
    layer.get_parameter(f"{plan.local}.weight").data.copy_(packed.dequantize())


def relative_error(packed: PackedWeight, weight: Tensor) -> float:
    """||Q - W||^2 / ||W||^2 of the stored weight."""
    return float((packed.dequantize() - weight).square().sum() / weight.square().sum().clamp(min=1e-30))
