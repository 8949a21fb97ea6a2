"""Round to nearest without data: straight from the source's tensors, one linear at a time."""

from collections.abc import Iterable
from time import perf_counter

import torch
from torch import Tensor

from vlmq_serve.calibrate.activations import InputQuantizer, range_tensors
from vlmq_serve.calibrate.linear import solve
from vlmq_serve.calibrate.linear_plan import LinearPlan
from vlmq_serve.calibrate.loading import choose_device
from vlmq_serve.calibrate.plan import Plan
from vlmq_serve.calibrate.progress import Progress
from vlmq_serve.calibrate.report import LayerResult, LinearResult, peak_memory_mib
from vlmq_serve.calibrate.work import WorkFolder
from vlmq_serve.format.shards import read_tensors
from vlmq_serve.format.weight import PackedWeight

ROWS_AT_ONCE = 16384
"""Rows of a head that are solved together: its fp32 copy would be the largest tensor of the run."""


def round_layers(plan: Plan, work: WorkFolder, resume: bool, progress: Progress) -> list[LayerResult]:
    """Quantize all layers into the work folder; the results have weight errors, but no output errors."""
    work.prepare(resume)
    results = work.finished()
    progress.stage("round weights", plan.layers)
    for index, linears in enumerate(plan.by_layer):
        if index >= len(results):
            chosen = list(linears.values())
            result, packed = round_all(index, chosen, plan)
            work.store(result, packed, inputs=_dynamic_inputs(chosen, plan))
            results.append(result)
        progress.advance()
    for part in plan.parts:
        index = part[0].layer
        if work.record(index) is None:
            work.store(*round_all(index, part, plan))
        results += filter(None, [work.record(index)])
    return results


def _dynamic_inputs(linears: list[LinearPlan], plan: Plan) -> dict[str, Tensor]:
    """Simulated activations whose ranges need no data."""
    scheme = plan.recipe.activations
    names = [linear.local for linear in linears if linear.scheme is not None] if scheme else []
    return range_tensors({name: InputQuantizer(scheme) for name in names}) if scheme else {}


def round_all(index: int, linears: Iterable[LinearPlan], plan: Plan) -> tuple[LayerResult, dict[str, PackedWeight]]:
    """All of `linears` that have a scheme, as the record `index` of the work folder."""
    started = perf_counter()
    packed: dict[str, PackedWeight] = {}
    rows = []
    for linear in linears:
        if linear.scheme is None:
            continue
        before = perf_counter()
        packed[linear.name], error = round_linear(linear, plan)
        rows.append(LinearResult(linear.name, str(linear.scheme), error, seconds=round(perf_counter() - before, 3)))
    result = LayerResult(index, tuple(rows), {}, round(perf_counter() - started, 3), peak_memory_mib())
    return result, packed


def round_linear(linear: LinearPlan, plan: Plan) -> tuple[PackedWeight, float]:
    """The packed weight and its relative squared error; the grid is the recipe's, where that needs no data."""
    grid = "minmax" if plan.recipe.grid == "minmax" else "mse"
    recipe = plan.recipe.model_copy(update={"method": "rtn", "base": "auto", "grid": grid})
    device = choose_device(plan.recipe.device)
    weight = read_tensors(plan.source, [linear.tensor])[linear.tensor]
    parts, error, energy = [], 0.0, 0.0
    for rows in weight.split(ROWS_AT_ONCE):
        full = rows.to(device, torch.float32)
        packed = solve(linear, full, recipe, None, {}).pack()
        error += float((packed.dequantize() - full).square().sum())
        energy += float(full.square().sum())
        parts.append(packed.to("cpu"))
    return join_rows(parts), error / max(energy, 1e-30)


def join_rows(parts: list[PackedWeight]) -> PackedWeight:
    """One weight from parts that lie below each other."""
    zeros = [part.zeros for part in parts if part.zeros is not None]
    qweight, scales = (torch.cat([getattr(part, name) for part in parts]) for name in ("qweight", "scales"))
    return PackedWeight(qweight, scales, torch.cat(zeros) if zeros else None, parts[0].scheme)
