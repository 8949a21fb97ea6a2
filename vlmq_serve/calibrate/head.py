"""The head, solved like a decoder linear: on the normed hidden states that leave the last decoder layer."""

from time import perf_counter

import torch
from torch import Tensor, nn

from vlmq_serve.calibrate.hessian import Statistics, StatisticsAccumulator
from vlmq_serve.calibrate.linear import solve
from vlmq_serve.calibrate.linear_plan import LinearPlan
from vlmq_serve.calibrate.metrics import ALL
from vlmq_serve.calibrate.plan import Plan
from vlmq_serve.calibrate.report import LayerResult, LinearResult, peak_memory_mib
from vlmq_serve.calibrate.rounding import ROWS_AT_ONCE, join_rows, round_linear
from vlmq_serve.calibrate.samples import VISION
from vlmq_serve.calibrate.solvers.factor import InverseFactor
from vlmq_serve.calibrate.streams import Streams
from vlmq_serve.calibrate.work import WorkFolder
from vlmq_serve.format.shards import read_tensors


@torch.no_grad()
def quantize_head(linear: LinearPlan, norm: nn.Module, plan: Plan, streams: Streams, work: WorkFolder) -> LayerResult:
    """Solve the head into the work folder, or take what an interrupted run has left there.

    By GPTQ, or to nearest where the method rounds decoder linears so. Without GPTAQ's residual: the head is not asked
    to make good what the layers before it have lost. Vision tokens do not count: nothing is predicted from them.
    """
    stored = work.record(linear.layer)
    if stored is not None or linear.scheme is None:
        return stored or LayerResult(linear.layer, (), {}, 0.0, peak_memory_mib())
    started = perf_counter()
    if plan.recipe.solver(linear.scheme.bits) != "rtn":
        recipe = plan.recipe.model_copy(update={"method": "gptq", "base": "auto"})
        statistics = head_statistics(linear, norm, streams)
        weight = read_tensors(plan.source, [linear.tensor])[linear.tensor]
        parts, factors, sums = [], dict[int, InverseFactor](), torch.zeros(4, dtype=torch.float64)
        for rows in weight.split(ROWS_AT_ONCE):
            full = rows.to(streams.device, torch.float32)
            solution = solve(linear, full, recipe, statistics, factors)
            sums += error_sums(solution.dequantize() - full, full, statistics.hessian)
            damping = solution.damping
            parts.append(solution.pack().to("cpu"))
        packed, weight_error = join_rows(parts), float(sums[0] / sums[1])
        errors = {ALL: float(sums[2] / sums[3])}
    else:
        packed, weight_error = round_linear(linear, plan)
        errors, damping = {}, 0.0
    seconds = round(perf_counter() - started, 3)
    row = LinearResult(linear.name, str(linear.scheme), weight_error, errors, damping, seconds=seconds)
    result = LayerResult(linear.layer, (row,), {}, seconds, peak_memory_mib())
    work.store(result, {linear.name: packed})
    return result


def head_statistics(linear: LinearPlan, norm: nn.Module, streams: Streams) -> Statistics:
    """Statistics of what enters the head, text tokens only; `norm` is the one behind the last decoder layer."""
    norm.to(streams.device)
    sums = StatisticsAccumulator(linear.shape[1], False, streams.device)
    for item in streams:
        sums.add(norm(item.quantized), weights=(item.modality != VISION).float())
    return sums.finish()


def error_sums(error: Tensor, weight: Tensor, hessian: Tensor) -> Tensor:
    """fp64 [4]: ||E||^2, ||W||^2, tr(E H E^T), tr(W H W^T); the last two are the output's error and its energy."""
    plain = [m.square().sum() for m in (error, weight)]
    outputs = [((m @ hessian) * m).sum() for m in (error, weight)]
    return torch.stack([*plain, *outputs]).double().cpu()
