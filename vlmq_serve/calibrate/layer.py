"""Quantizes one decoder layer: importance, statistics and solution per group of linears, then both streams move on."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter

import torch
from torch import Tensor, nn

from vlmq_serve.calibrate.capture import linear_input, output_taps, run_layer
from vlmq_serve.calibrate.families.adapter import ModelAdapter
from vlmq_serve.calibrate.hessian import Statistics, StatisticsAccumulator
from vlmq_serve.calibrate.importance import TokenImportance, attention_gradients
from vlmq_serve.calibrate.metrics import ErrorByModality, mean_by_modality
from vlmq_serve.calibrate.plan import LinearPlan
from vlmq_serve.calibrate.recipe import Recipe
from vlmq_serve.calibrate.report import Errors, LayerResult, LinearResult, peak_memory_mib
from vlmq_serve.calibrate.solvers.factor import InverseFactor, factor_inverse
from vlmq_serve.calibrate.solvers.gptq import solve_gptq
from vlmq_serve.calibrate.solvers.rtn import solve_rtn
from vlmq_serve.calibrate.solvers.solution import Solution, SolverOptions
from vlmq_serve.calibrate.streams import Streams
from vlmq_serve.format.errors import VLMQError
from vlmq_serve.format.weight import PackedWeight

Importance = Mapping[str, TokenImportance]


@dataclass(frozen=True)
class QuantizedLayer:
    """Packed weights by source name, the report, and token weights kept for pictures (sample to fp32 [taps, T])."""

    packed: dict[str, PackedWeight]
    result: LayerResult
    saliency: dict[int, Tensor]


@torch.no_grad()
def quantize_layer(
    layer: nn.Module, linears: Mapping[str, LinearPlan], adapter: ModelAdapter, recipe: Recipe, streams: Streams
) -> QuantizedLayer:
    """Quantize `layer` in place (dequantized weights) and move both streams behind it."""
    started = perf_counter()
    layer.to(streams.device)
    full = copy.deepcopy(layer)
    importance: Importance = {}
    if recipe.method == "vlmq":
        importance = measure_importance(full, adapter, streams, recipe.exponent)
    packed: dict[str, PackedWeight] = {}
    partial: dict[str, LinearResult] = {}
    for group in adapter.linear_groups:
        plans = [linears[name] for name in group if linears[name].scheme is not None]
        if plans:
            _solve_group(layer, full, plans, recipe, streams, importance, packed, partial)
    errors, layer_errors = advance_streams(layer, full, list(partial), streams)
    layer.to("cpu")
    results = tuple(LinearResult(**{**vars(result), "errors": errors[name]}) for name, result in partial.items())
    index = next(iter(linears.values())).layer
    result = LayerResult(index, results, layer_errors, round(perf_counter() - started, 3), peak_memory_mib())
    saliency = keep_saliency(importance, adapter.importance_taps, streams, recipe.save_saliency)
    return QuantizedLayer(packed, result, saliency)


@torch.no_grad()
def restore_layer(
    layer: nn.Module, linears: Mapping[str, LinearPlan], packed: Mapping[str, PackedWeight], streams: Streams
) -> None:
    """Put stored weights of an earlier run into `layer` and move both streams behind it."""
    layer.to(streams.device)
    full = copy.deepcopy(layer)
    for plan in linears.values():
        if plan.scheme is not None:
            write_weight(layer, plan, packed[plan.name].dequantize())
    advance_streams(layer, full, (), streams)
    layer.to("cpu")


def measure_importance(
    layer: nn.Module, adapter: ModelAdapter, streams: Streams, exponent: int
) -> dict[str, TokenImportance]:
    """Token weights of the attention linears: one forward and one backward of the attention block per batch."""
    gradients: dict[str, list[Tensor]] = {name: [] for name in adapter.importance_taps}
    for item in streams:
        found = attention_gradients(
            layer, adapter.attention_block, adapter.importance_taps, item.full, item.quantized, item.kwargs
        )
        for name, gradient in found.items():
            gradients[name].append(gradient.cpu())
    return {name: TokenImportance.from_gradients(parts, exponent) for name, parts in gradients.items()}


def collect_statistics(
    layer: nn.Module,
    full: nn.Module,
    plans: Sequence[LinearPlan],
    recipe: Recipe,
    streams: Streams,
    importance: Importance,
) -> dict[str, Statistics]:
    """Statistics per linear of a group; linears without token weights share one set, since they read one input."""
    residual = any(plan.scheme is not None and recipe.uses_residual(plan.scheme.bits) for plan in plans)
    keys = {plan.local: plan.local if plan.local in importance else "" for plan in plans}
    features, first = plans[0].shape[1], plans[0].local
    sums = {key: StatisticsAccumulator(features, residual, streams.device) for key in dict.fromkeys(keys.values())}
    for item in streams:
        seen = linear_input(layer, first, item.quantized, item.kwargs)
        wanted = linear_input(full, first, item.full, item.kwargs) if residual else None
        for key, accumulator in sums.items():
            weights = importance[key].weights[item.position].to(streams.device) if key else None
            accumulator.add(seen, wanted, weights)
    finished = {key: accumulator.finish() for key, accumulator in sums.items()}
    return {local: finished[key] for local, key in keys.items()}


def _solve_group(
    layer: nn.Module,
    full: nn.Module,
    plans: Sequence[LinearPlan],
    recipe: Recipe,
    streams: Streams,
    importance: Importance,
    packed: dict[str, PackedWeight],
    results: dict[str, LinearResult],
) -> None:
    """Solve the linears of one group, write their weights back into `layer`, and note the results."""
    statistics: dict[str, Statistics] = {}
    if recipe.needs_data:
        statistics = collect_statistics(layer, full, plans, recipe, streams, importance)
    factors: dict[int, InverseFactor] = {}
    for plan in plans:
        started = perf_counter()
        weight = layer.get_parameter(f"{plan.local}.weight").detach().float()
        solution = solve(plan, weight, recipe, statistics.get(plan.local), factors)
        packed[plan.name] = solution.pack()
        stored = packed[plan.name].dequantize().to(weight.device)
        weight_error = relative_error(stored, weight)  # before the write: `weight` may share the layer's memory
        write_weight(layer, plan, stored)
        weights = importance.get(plan.local)
        results[plan.local] = LinearResult(
            plan.name,
            str(plan.scheme),
            weight_error,
            damping=solution.damping,
            importance=_importance_by_modality(weights, streams) if weights else {},
            uniform_importance=weights is not None and weights.uniform,
            seconds=round(perf_counter() - started, 3),
        )


def solve(
    plan: LinearPlan,
    weight: Tensor,
    recipe: Recipe,
    statistics: Statistics | None,
    factors: dict[int, InverseFactor],
) -> Solution:
    """Run the recipe's solver on one weight [N, K] (fp32); `factors` keeps what linears with one Hessian share."""
    if plan.scheme is None:
        raise RuntimeError(f"{plan.name} is not to be quantized")
    options = solver_options(recipe, plan.dtype)
    if statistics is None:
        return solve_rtn(weight, plan.scheme, options)
    try:
        if id(statistics) not in factors:
            factors[id(statistics)] = factor_inverse(statistics.hessian, options.percdamp, options.act_order)
    except VLMQError as error:
        raise VLMQError(f"{plan.name}: {error}") from None
    residual = recipe.uses_residual(plan.scheme.bits)
    return solve_gptq(weight, statistics, plan.scheme, options, residual, factors[id(statistics)])


def solver_options(recipe: Recipe, scale_dtype: torch.dtype) -> SolverOptions:
    return SolverOptions(scale_dtype, recipe.grid, recipe.percdamp, recipe.act_order, recipe.alpha)


def advance_streams(
    layer: nn.Module, full: nn.Module, linears: Sequence[str], streams: Streams
) -> tuple[dict[str, Errors], Errors]:
    """Run both paths through the finished layer; relative output errors of its linears and of the layer."""
    errors = {name: ErrorByModality() for name in linears}
    total = ErrorByModality()
    for item in streams:
        with output_taps(full, linears) as wanted:
            full_out = run_layer(full, item.full, item.kwargs)
        with output_taps(layer, linears) as got:
            quantized_out = run_layer(layer, item.quantized, item.kwargs)
        for name in linears:
            errors[name].add(got[name], wanted[name], item.modality)
        total.add(quantized_out, full_out, item.modality)
        streams.advance(item.position, full_out, quantized_out)
    return {name: error.relative() for name, error in errors.items()}, total.relative()


def write_weight(layer: nn.Module, plan: LinearPlan, weight: Tensor) -> None:
    """Put dequantized weights into the layer, in its own dtype and on its own device."""
    layer.get_parameter(f"{plan.local}.weight").data.copy_(weight)


def relative_error(quantized: Tensor, weight: Tensor) -> float:
    """||Q - W||^2 / ||W||^2."""
    return float((quantized - weight).square().sum() / weight.square().sum().clamp(min=1e-30))


def keep_saliency(importance: Importance, taps: Sequence[str], streams: Streams, count: int) -> dict[int, Tensor]:
    """Token weights [taps, T] of the first `count` samples."""
    kept: dict[int, Tensor] = {}
    for position, batch in enumerate(streams.batches if importance else ()):
        for row, index in enumerate(batch.indices):
            if index < count:
                kept[index] = torch.stack([importance[name].weights[position][row] for name in taps])
    return kept


def _importance_by_modality(importance: TokenImportance, streams: Streams) -> Errors:
    values = torch.cat([w.reshape(1, -1) for w in importance.weights], 1)
    modality = torch.cat([batch.modality.reshape(1, -1) for batch in streams.batches], 1)
    return mean_by_modality(values, modality)
