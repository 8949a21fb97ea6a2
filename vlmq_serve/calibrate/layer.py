"""Quantizes one decoder layer, block by block, or puts back what an interrupted run had done of it."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from time import perf_counter

import torch
from torch import Tensor, nn

from vlmq_serve.calibrate.activations import InputQuantizer, quantized_inputs, range_tensors, read_quantizers
from vlmq_serve.calibrate.block import BlockRun, advance_streams, quantize_block
from vlmq_serve.calibrate.equalize import ChannelSearch, TokenError
from vlmq_serve.calibrate.importance import TokenImportance
from vlmq_serve.calibrate.linear import write_weight
from vlmq_serve.calibrate.linear_plan import LinearPlan
from vlmq_serve.calibrate.plan import Plan
from vlmq_serve.calibrate.recipe import Recipe
from vlmq_serve.calibrate.report import Errors, LayerResult, LinearResult, peak_memory_mib
from vlmq_serve.calibrate.signals import LayerSignals
from vlmq_serve.calibrate.solvers.solution import SolverOptions
from vlmq_serve.calibrate.sources import measure_importance
from vlmq_serve.calibrate.streams import Streams
from vlmq_serve.calibrate.work import WorkFolder
from vlmq_serve.format.weight import PackedWeight


@dataclass(frozen=True)
class QuantizedLayer:
    """Packed weights and changed dense tensors by source name, the report, and token weights kept for pictures (sample
    to fp32 [taps, T]), and ranges of simulated activations (`activations.range_tensors`)."""

    packed: dict[str, PackedWeight]
    changed: dict[str, Tensor]
    result: LayerResult
    saliency: dict[int, Tensor]
    inputs: dict[str, Tensor]


@torch.no_grad()
def quantize_layer(
    layer: nn.Module,
    linears: Mapping[str, LinearPlan],
    plan: Plan,
    streams: Streams,
    signals: LayerSignals,
) -> QuantizedLayer:
    """Quantize `layer` in place (dequantized weights) and move both streams behind it."""
    started = perf_counter()
    layer.to(streams.device)
    full = copy.deepcopy(layer)
    packed: dict[str, PackedWeight] = {}
    results: list[LinearResult] = []
    errors: Errors = {}
    recipe = plan.recipe
    importance = measure_importance(full, plan.adapter, recipe, plan.weighted, streams, signals.gradients)
    importance |= signals.importance
    changed: dict[str, Tensor] = {}
    inputs: dict[str, InputQuantizer] = {}
    for number, block in enumerate(plan.adapter.blocks):
        search = channel_search(recipe, linears, signals.errors[number]) if signals.errors else None
        run = BlockRun(layer, full, block, linears, recipe, streams, importance, search, signals.clipping, inputs)
        errors = quantize_block(run)
        packed |= run.packed
        changed |= run.folded.changed
        results += run.results.values()
    layer.to("cpu")
    index = next(iter(linears.values())).layer
    if plan.adapter.behind_layer is not None:
        streams.pass_layer(index, plan.adapter.behind_layer)
    seconds = round(perf_counter() - started, 3)
    result = LayerResult(index, tuple(results), errors, seconds, peak_memory_mib())
    named = {plan.tensor_name(index, name): value.cpu() for name, value in changed.items()}
    saliency = keep_saliency(importance, streams, recipe.save_saliency)
    return QuantizedLayer(packed, named, result, saliency, range_tensors(inputs))


@torch.no_grad()
def restore_layer(
    layer: nn.Module,
    linears: Mapping[str, LinearPlan],
    plan: Plan,
    work: WorkFolder,
    streams: Streams,
) -> None:
    """Put stored weights of an earlier run into `layer` and move both streams behind it."""
    layer.to(streams.device)
    full = copy.deepcopy(layer)
    packed, index = work.packed(), next(iter(linears.values())).layer
    for linear in linears.values():
        if linear.scheme is not None:
            write_weight(layer, linear, packed[linear.name])
    prefix = plan.tensor_name(index, "")
    for name, value in work.changed(index).items():
        layer.get_parameter(name.removeprefix(prefix)).data.copy_(value)
    activations = plan.recipe.activations
    inputs = read_quantizers(activations, work.inputs(index)) if activations else {}
    with quantized_inputs(layer, inputs):
        for block in plan.adapter.blocks:
            advance_streams(layer, full, block, (), streams)
    layer.to("cpu")
    if plan.adapter.behind_layer is not None:
        streams.pass_layer(index, plan.adapter.behind_layer)


def keep_saliency(importance: Mapping[str, TokenImportance], streams: Streams, count: int) -> dict[int, Tensor]:
    """Token weights [taps, T] of the first `count` samples."""
    kept: dict[int, Tensor] = {}
    for position, batch in enumerate(streams.batches if importance else ()):
        for row, index in enumerate(batch.indices):
            if index < count:
                kept[index] = torch.stack([weights.weights[position][row] for weights in importance.values()])
    return kept


def channel_search(recipe: Recipe, linears: Mapping[str, LinearPlan], error: TokenError) -> ChannelSearch:
    """The search of the recipe; it rounds with the recipe's grid, or a min-max one where that needs a Hessian."""
    grid = recipe.grid if recipe.grid in ("minmax", "mse") else "minmax"
    dtype = next(iter(linears.values())).stored_dtype
    return ChannelSearch(error, SolverOptions(dtype, grid), recipe.searches_exposed, recipe.activations)
