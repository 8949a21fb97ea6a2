"""Quantizes one residual block: statistics and solution per group of linears; then both streams move on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from time import perf_counter

import torch
from torch import nn

from vlmq_serve.calibrate.activations import InputQuantizer, add_quantizer, observe
from vlmq_serve.calibrate.capture import linear_input, output_taps
from vlmq_serve.calibrate.equalize import ChannelSearch, equalize_block
from vlmq_serve.calibrate.families.adapter import ResidualBlock
from vlmq_serve.calibrate.folding import Folded
from vlmq_serve.calibrate.hessian import Statistics, StatisticsAccumulator
from vlmq_serve.calibrate.importance import TokenImportance
from vlmq_serve.calibrate.linear import Clipping, relative_error, solve, write_weight
from vlmq_serve.calibrate.linear_plan import LinearPlan
from vlmq_serve.calibrate.metrics import ErrorByModality, mean_by_modality
from vlmq_serve.calibrate.recipe import Recipe
from vlmq_serve.calibrate.report import Errors, LinearResult
from vlmq_serve.calibrate.solvers.factor import InverseFactor
from vlmq_serve.calibrate.streams import Streams
from vlmq_serve.format.weight import PackedWeight


@dataclass
class BlockRun:
    """One block under way: `layer` receives quantized weights, `full` keeps the original ones.

    `inputs`: quantizers of the simulated activations of `layer`, hooked in group by group.
    """

    layer: nn.Module
    full: nn.Module
    block: ResidualBlock
    linears: Mapping[str, LinearPlan]
    recipe: Recipe
    streams: Streams
    importance: Mapping[str, TokenImportance] = field(default_factory=dict)
    search: ChannelSearch | None = None
    clipping: Clipping | None = None
    inputs: dict[str, InputQuantizer] = field(default_factory=dict)
    folded: Folded = field(default_factory=Folded)
    packed: dict[str, PackedWeight] = field(default_factory=dict)
    results: dict[str, LinearResult] = field(default_factory=dict)


def quantize_block(run: BlockRun) -> Errors:
    """Fill `packed` and `results` of `run`, move the streams behind the block; relative errors of its output."""
    if run.search is not None:
        run.folded = equalize_block(run.layer, run.full, run.block, run.linears, run.streams, run.search)
    for group in run.block.linear_groups:
        plans = [run.linears[name] for name in group if run.linears[name].scheme is not None]
        if plans:
            _quantize_inputs(run, plans)
            _solve_group(run, plans)
    errors, output_errors = advance_streams(run.layer, run.full, run.block, list(run.results), run.streams)
    run.results = {name: replace(result, errors=errors[name]) for name, result in run.results.items()}
    return output_errors


def collect_statistics(run: BlockRun, plans: Sequence[LinearPlan]) -> dict[str, Statistics]:
    """Statistics per linear of a group; linears without token weights share one set, since they read one input."""
    residual = any(plan.scheme is not None and run.recipe.uses_residual(plan.scheme.bits) for plan in plans)
    keys = {plan.local: plan.local if plan.local in run.importance else "" for plan in plans}
    features, first, device = plans[0].shape[1], plans[0].local, run.streams.device
    sums = {key: StatisticsAccumulator(features, residual, device) for key in dict.fromkeys(keys.values())}
    forward = run.block.forward
    for item in run.streams:
        seen = linear_input(run.layer, forward, first, item.quantized, item.kwargs)
        wanted = linear_input(run.full, forward, first, item.full, item.kwargs) if residual else None
        for key, accumulator in sums.items():
            weights = run.importance[key].weights[item.position].to(device) if key else None
            accumulator.add(seen, wanted, weights)
    finished = {key: accumulator.finish() for key, accumulator in sums.items()}
    return {local: finished[key] for local, key in keys.items()}


def _quantize_inputs(run: BlockRun, plans: Sequence[LinearPlan]) -> None:
    """From here on the group of `layer` reads simulated activations, in its statistics as in all that follows."""
    if run.recipe.activations is None:
        return
    forward, first = run.block.forward, plans[0].local
    seen = (linear_input(run.layer, forward, first, item.quantized, item.kwargs) for item in run.streams)
    quantizer = observe(run.recipe.activations, seen, run.clipping.activations if run.clipping else 1.0)
    for plan in plans:
        run.inputs[plan.local] = quantizer
        add_quantizer(run.layer.get_submodule(plan.local), quantizer)


def _solve_group(run: BlockRun, plans: Sequence[LinearPlan]) -> None:
    """Solve the linears of one group, write their weights back, and note the results."""
    needed = any(plan.scheme is not None and run.recipe.needs_statistics(plan.scheme.bits) for plan in plans)
    statistics = collect_statistics(run, plans) if needed else {}
    factors: dict[int, InverseFactor] = {}
    for plan in plans:
        started = perf_counter()
        weight = run.folded.weight(run.full, plan.local)
        solution = solve(plan, weight, run.recipe, statistics.get(plan.local), factors, run.clipping)
        packed = solution.pack()
        write_weight(run.layer, plan, packed)
        run.packed[plan.name] = packed
        weights = run.importance.get(plan.local)
        run.results[plan.local] = LinearResult(
            plan.name,
            str(plan.scheme),
            relative_error(packed, weight),
            damping=solution.damping,
            importance=_importance_by_modality(weights, run.streams) if weights else {},
            uniform_importance=weights is not None and weights.uniform,
            effective_tokens=round(weights.effective_tokens, 1) if weights else None,
            seconds=round(perf_counter() - started, 3),
        )


def advance_streams(
    layer: nn.Module, full: nn.Module, block: ResidualBlock, linears: Sequence[str], streams: Streams
) -> tuple[dict[str, Errors], Errors]:
    """Run both paths through the finished block; relative output errors of its linears and of the block."""
    errors = {name: ErrorByModality() for name in linears}
    total = ErrorByModality()
    for item in streams:
        with output_taps(full, linears) as wanted:
            full_out = block.forward(full, item.full, item.kwargs)
        with output_taps(layer, linears) as got:
            quantized_out = block.forward(layer, item.quantized, item.kwargs)
        for name in linears:
            errors[name].add(got[name], wanted[name], item.modality)
        total.add(quantized_out, full_out, item.modality)
        streams.advance(item.position, full_out, quantized_out)
    return {name: error.relative() for name, error in errors.items()}, total.relative()


def _importance_by_modality(importance: TokenImportance, streams: Streams) -> Errors:
    values = torch.cat([w.reshape(1, -1) for w in importance.weights], 1)
    modality = torch.cat([batch.modality.reshape(1, -1) for batch in streams.batches], 1)
    return mean_by_modality(values, modality)
