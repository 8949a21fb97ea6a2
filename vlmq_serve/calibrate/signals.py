"""What is known of a layer's tokens before the layers are quantized: from one pass through the whole model."""

from collections.abc import Sequence
from dataclasses import dataclass

from vlmq_serve.calibrate.balance import modality_ratios, modality_weights
from vlmq_serve.calibrate.equalize import TokenError
from vlmq_serve.calibrate.plan import Plan
from vlmq_serve.calibrate.sources import Gradients
from vlmq_serve.calibrate.streams import Streams


@dataclass(frozen=True)
class LayerSignals:
    """One layer: gradients of the answers' cross-entropy, and per block the error by which channel scales are judged;
    None where the method does not ask for it."""

    gradients: Gradients | None = None
    errors: Sequence[TokenError] | None = None


def layer_signals(plan: Plan, streams: Streams, gradients: Sequence[Gradients] | None) -> list[LayerSignals]:
    """Signals of every layer; `gradients` per layer, where the recipe needs them."""
    found: Sequence[Gradients | None] = gradients or [None] * plan.layers
    if not plan.recipe.equalizes:
        return [LayerSignals(layer) for layer in found]
    return [LayerSignals(layer, errors) for layer, errors in zip(found, _errors(plan, streams, gradients), strict=True)]


def _errors(plan: Plan, streams: Streams, gradients: Sequence[Gradients] | None) -> list[list[TokenError]]:
    if gradients is None:  # AWQ
        return [[TokenError() for _ in plan.adapter.blocks]] * plan.layers
    modality = [batch.modality for batch in streams.batches]
    ratios = modality_ratios(gradients, plan.adapter, modality)
    return [[TokenError(1, modality_weights(modality, ratio)) for ratio in row] for row in ratios]
