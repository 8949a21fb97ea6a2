"""Round to nearest without data: straight from the source's tensors, a layer at a time."""

from time import perf_counter

import torch
from torch import Tensor

from vlmq_serve.calibrate.activations import InputQuantizer, range_tensors
from vlmq_serve.calibrate.linear import relative_error, solve
from vlmq_serve.calibrate.loading import choose_device
from vlmq_serve.calibrate.plan import LinearPlan, Plan
from vlmq_serve.calibrate.progress import Progress
from vlmq_serve.calibrate.report import LayerResult, LinearResult, peak_memory_mib
from vlmq_serve.calibrate.work import WorkFolder
from vlmq_serve.format.shards import read_tensors
from vlmq_serve.format.weight import PackedWeight


def round_layers(plan: Plan, work: WorkFolder, resume: bool, progress: Progress) -> list[LayerResult]:
    """Quantize all layers into the work folder; the results have weight errors, but no output errors."""
    work.prepare(resume)
    results = work.finished()
    progress.stage("round weights", plan.layers)
    for index, linears in enumerate(plan.by_layer):
        if index >= len(results):
            result, packed = _round_layer(index, list(linears.values()), plan)
            work.store(result, packed, {}, inputs=_dynamic_inputs(list(linears.values()), plan))
            results.append(result)
        progress.advance()
    return results


def _dynamic_inputs(linears: list[LinearPlan], plan: Plan) -> dict[str, Tensor]:
    """Simulated activations whose ranges need no data."""
    scheme = plan.recipe.activations
    names = [linear.local for linear in linears if linear.scheme is not None] if scheme else []
    return range_tensors({name: InputQuantizer(scheme) for name in names}) if scheme else {}


def _round_layer(index: int, linears: list[LinearPlan], plan: Plan) -> tuple[LayerResult, dict[str, PackedWeight]]:
    started = perf_counter()
    packed: dict[str, PackedWeight] = {}
    rows = []
    device = choose_device(plan.recipe)
    weights = read_tensors(plan.source, [f"{linear.name}.weight" for linear in linears])
    for linear in linears:
        if linear.scheme is None:
            continue
        before = perf_counter()
        weight = weights[f"{linear.name}.weight"].to(device, torch.float32)
        packed[linear.name] = solve(linear, weight, plan.recipe, None, {}).pack()
        error = relative_error(packed[linear.name], weight)
        rows.append(LinearResult(linear.name, str(linear.scheme), error, seconds=round(perf_counter() - before, 3)))
    result = LayerResult(index, tuple(rows), {}, round(perf_counter() - started, 3), peak_memory_mib())
    return result, packed
