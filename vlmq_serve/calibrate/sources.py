"""Where token weights come from: the losses of VLMQ's ablation (arXiv 2508.03351, Tables 7 and 8) and their taps.

attention         || A(F) - A(U) ||^2, A the attention block with its residual (the method)
attention_heads   || h(F) - h(U) ||^2, h the input of o_proj: the cut before the output projection; no gradient at o
layer             || B(F) - B(U) ||^2, B the whole decoder layer; gradients at all its linears
cross_entropy     of the answer tokens through the whole unquantized model, see `cross_entropy`
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from vlmq_serve.calibrate.capture import linear_input
from vlmq_serve.calibrate.families.adapter import BlockForward, ModelAdapter
from vlmq_serve.calibrate.importance import TokenImportance, local_gradients
from vlmq_serve.calibrate.recipe import Recipe
from vlmq_serve.calibrate.settings import ImportanceSource
from vlmq_serve.calibrate.streams import Streams

Gradients = Mapping[str, Sequence[Tensor]]
"""Gradient magnitudes fp32 [B, T] per batch, by the local name of the linear."""


def taps_of(adapter: ModelAdapter, source: ImportanceSource) -> tuple[str, ...]:
    """Linears of a layer at whose outputs the loss has a gradient."""
    if source in ("layer", "cross_entropy"):
        return adapter.linears
    attention = adapter.attention
    return attention.importance_taps if source == "attention" else _before_output(attention.linear_groups)


def measure_importance(
    layer: nn.Module,
    adapter: ModelAdapter,
    recipe: Recipe,
    weighted: Sequence[str],
    streams: Streams,
    answer_gradients: Gradients | None = None,
) -> dict[str, TokenImportance]:
    """Token weights of the `weighted` linears of a layer that still has its original weights.

    One forward pass of F, one of U and one backward pass of the part that the loss compares, per batch.
    `answer_gradients` are those of the cross-entropy, which are measured before any layer changes.
    """
    if not weighted:
        return {}
    found = answer_gradients or _local(layer, adapter, recipe.importance, weighted, streams)
    return {name: TokenImportance.from_gradients(found[name], recipe.exponent, recipe.per_sample) for name in weighted}


def _local(
    layer: nn.Module, adapter: ModelAdapter, source: ImportanceSource, weighted: Sequence[str], streams: Streams
) -> Gradients:
    forward = _compared_part(adapter, source)
    gradients: dict[str, list[Tensor]] = {name: [] for name in weighted}
    for item in streams:
        found = local_gradients(layer, forward, weighted, item.full, item.quantized, item.kwargs)
        for name, gradient in found.items():
            gradients[name].append(gradient.cpu())
    return gradients


def _compared_part(adapter: ModelAdapter, source: ImportanceSource) -> BlockForward:
    if source == "layer":
        return adapter.layer_forward
    attention = adapter.attention
    if source == "attention":
        return attention.forward
    return partial(_input_of, attention.linear_groups[-1][0], attention.forward)


def _input_of(
    linear: str, forward: BlockForward, layer: nn.Module, hidden: Tensor, kwargs: Mapping[str, Any]
) -> Tensor:
    return linear_input(layer, forward, linear, hidden, kwargs)


def _before_output(groups: Sequence[Sequence[str]]) -> tuple[str, ...]:
    return tuple(name for group in groups[:-1] for name in group)
