"""Quantizes one decoder layer, block by block, or puts back what an interrupted run had done of it."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from time import perf_counter

import torch
from torch import Tensor, nn

from vlmq_serve.calibrate.block import BlockRun, advance_streams, quantize_block
from vlmq_serve.calibrate.families.adapter import ModelAdapter
from vlmq_serve.calibrate.importance import TokenImportance
from vlmq_serve.calibrate.linear import write_weight
from vlmq_serve.calibrate.plan import LinearPlan, Plan
from vlmq_serve.calibrate.report import Errors, LayerResult, LinearResult, peak_memory_mib
from vlmq_serve.calibrate.sources import Gradients, measure_importance
from vlmq_serve.calibrate.streams import Streams
from vlmq_serve.format.weight import PackedWeight


@dataclass(frozen=True)
class QuantizedLayer:
    """Packed weights by source name, the report, and token weights kept for pictures (sample to fp32 [taps, T])."""

    packed: dict[str, PackedWeight]
    result: LayerResult
    saliency: dict[int, Tensor]


@torch.no_grad()
def quantize_layer(
    layer: nn.Module,
    linears: Mapping[str, LinearPlan],
    plan: Plan,
    streams: Streams,
    answer_gradients: Gradients | None = None,
) -> QuantizedLayer:
    """Quantize `layer` in place (dequantized weights) and move both streams behind it.

    `answer_gradients` of this layer where the recipe's token weights come from the cross-entropy.
    """
    started = perf_counter()
    layer.to(streams.device)
    full = copy.deepcopy(layer)
    packed: dict[str, PackedWeight] = {}
    results: list[LinearResult] = []
    errors: Errors = {}
    recipe = plan.recipe
    importance = measure_importance(full, plan.adapter, recipe, plan.weighted, streams, answer_gradients)
    for block in plan.adapter.blocks:
        run = BlockRun(layer, full, block, linears, recipe, streams, importance)
        errors = quantize_block(run)
        packed |= run.packed
        results += run.results.values()
    layer.to("cpu")
    index = next(iter(linears.values())).layer
    seconds = round(perf_counter() - started, 3)
    result = LayerResult(index, tuple(results), errors, seconds, peak_memory_mib())
    return QuantizedLayer(packed, result, keep_saliency(importance, streams, recipe.save_saliency))


@torch.no_grad()
def restore_layer(
    layer: nn.Module,
    linears: Mapping[str, LinearPlan],
    adapter: ModelAdapter,
    packed: Mapping[str, PackedWeight],
    streams: Streams,
) -> None:
    """Put stored weights of an earlier run into `layer` and move both streams behind it."""
    layer.to(streams.device)
    full = copy.deepcopy(layer)
    for plan in linears.values():
        if plan.scheme is not None:
            write_weight(layer, plan, packed[plan.name])
    for block in adapter.blocks:
        advance_streams(layer, full, block, (), streams)
    layer.to("cpu")


def keep_saliency(importance: Mapping[str, TokenImportance], streams: Streams, count: int) -> dict[int, Tensor]:
    """Token weights [taps, T] of the first `count` samples."""
    kept: dict[int, Tensor] = {}
    for position, batch in enumerate(streams.batches if importance else ()):
        for row, index in enumerate(batch.indices):
            if index < count:
                kept[index] = torch.stack([weights.weights[position][row] for weights in importance.values()])
    return kept
