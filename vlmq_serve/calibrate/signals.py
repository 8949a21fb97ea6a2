"""What is known of a layer's tokens before the layers are quantized: from one pass through the whole model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from vlmq_serve.calibrate.balance import modality_ratios, modality_weights
from vlmq_serve.calibrate.equalize import TokenError
from vlmq_serve.calibrate.importance import TokenImportance
from vlmq_serve.calibrate.linear import Clipping
from vlmq_serve.calibrate.plan import Plan
from vlmq_serve.calibrate.sources import Gradients
from vlmq_serve.calibrate.streams import Streams
from vlmq_serve.calibrate.token_set import token_weights


@dataclass(frozen=True)
class LayerSignals:
    """One layer: gradients of the answers' cross-entropy, per block the error by which channel scales are judged, and
    token weights of linears that are known beforehand, and Q-VLM's clipping; None or empty where the method does not
    ask for it."""

    gradients: Gradients | None = None
    errors: Sequence[TokenError] | None = None
    importance: Mapping[str, TokenImportance] = field(default_factory=dict)
    clipping: Clipping | None = None


def layer_signals(plan: Plan, streams: Streams, gradients: Sequence[Gradients] | None) -> list[LayerSignals]:
    """Signals of every layer; `gradients` per layer, where the recipe needs them."""
    if plan.recipe.method == "tlq" and gradients is not None:
        return [_token_level(plan, streams, layer) for layer in gradients]
    found: Sequence[Gradients | None] = gradients or [None] * plan.layers
    if not plan.recipe.equalizes:
        return [LayerSignals(layer) for layer in found]
    return [LayerSignals(layer, errors) for layer, errors in zip(found, _errors(plan, streams, gradients), strict=True)]


def _token_level(plan: Plan, streams: Streams, gradients: Gradients) -> LayerSignals:
    """TLQ: one set of tokens per block, for its channel scales and for the Hessians of its linears."""
    errors: list[TokenError] = []
    importance: dict[str, TokenImportance] = {}
    for block in plan.adapter.blocks:
        found = gradients[block.linear_groups[-1][-1]]
        modality = [batch.modality for batch in streams.batches]
        weights = token_weights(found, modality, plan.recipe.token_budget, plan.recipe.exponent)
        errors.append(TokenError(2, weights.weights, weighted_statistic=True))
        importance |= {name: weights for group in block.linear_groups for name in group}
    return LayerSignals(gradients, errors, importance)


def _errors(plan: Plan, streams: Streams, gradients: Sequence[Gradients] | None) -> list[list[TokenError]]:
    if gradients is None:  # AWQ
        return [[TokenError() for _ in plan.adapter.blocks]] * plan.layers
    modality = [batch.modality for batch in streams.batches]
    ratios = modality_ratios(gradients, plan.adapter, modality)
    return [[TokenError(1, modality_weights(modality, ratio)) for ratio in row] for row in ratios]
