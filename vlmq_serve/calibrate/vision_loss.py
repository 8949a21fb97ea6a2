"""The loss by which the vision tower's clipping is learned: Q-VLM (Wang et al., NeurIPS 2024), Eq. 8 to 10.

X_k is what linear k of the tower reads, v the tower's output behind the merger, x the output of the last decoder layer,
a subscript q the quantized tower's:

    L     = CE(answers) + l1 L_ent + l2 L_err                                         (Eq. 10)
    L_ent = sum_k J_k H_k / sum_k J_k,   J_k = || d ||x_q - x|| / d X_k ||            (Eq. 8)
    L_err = ||v_q - v|| / ||v|| + ||x_q - x|| / ||x||                                 (Eq. 9)

H_k is the entropy of the soft assignment (Eq. 5) of X_k to the levels of its clipped grid; J_k weighs it and carries no
gradient.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from vlmq_serve.calibrate.cross_entropy import answer_loss
from vlmq_serve.calibrate.families.adapter import ModelAdapter
from vlmq_serve.calibrate.recipe import Recipe
from vlmq_serve.calibrate.vision import VisionSimulation, clipped_range, quantized_tower

_MAX_ELEMENTS = 2**12


def vision_loss(
    model: nn.Module,
    adapter: ModelAdapter,
    inputs: Mapping[str, Tensor],
    modality: Tensor,
    simulation: VisionSimulation,
    recipe: Recipe,
) -> Tensor:
    """L of Eq. 10 for one batch of equally long samples."""
    with torch.no_grad(), _outputs(model, adapter) as full:
        model(**inputs, use_cache=False)
    with quantized_tower(model, simulation), _outputs(model, adapter) as got, _inputs(model, simulation) as seen:
        logits = model(**inputs, use_cache=False).logits
    losses = answer_loss(logits, inputs["input_ids"], modality) / len(modality)
    drift = (got["decoder"].float() - full["decoder"].float()).norm()
    if recipe.vision_error:
        tower = (got["tower"].float() - full["tower"].float()).norm()
        losses = losses + recipe.vision_error * (
            tower / full["tower"].float().norm() + drift / full["decoder"].float().norm()
        )
    if recipe.vision_entropy:
        sizes = jacobian_norms(drift, list(seen.values()))
        entropies = [
            level_entropy(x, simulation.factors[name].inputs, simulation.activation_bits) for name, x in seen.items()
        ]
        losses = losses + recipe.vision_entropy * (sizes * torch.stack(entropies)).sum() / sizes.sum().clamp(min=1e-30)
    return losses


def jacobian_norms(drift: Tensor, inputs: Sequence[Tensor]) -> Tensor:
    """J_k [n], without a graph of its own; 0 where the drift does not depend on an input."""
    found = torch.autograd.grad(drift, inputs, retain_graph=True, allow_unused=True)
    return torch.stack([drift.new_zeros(()) if g is None else g.detach().float().norm() for g in found])


def level_entropy(x: Tensor, factor: Tensor | float, bits: int) -> Tensor:
    """H in nats of the levels of x [..., K], per token's clipped grid; at most 4,096 elements, every nth.

    With u = (x - low) / step, Eq. 5's exp(-(x - q_m)^2 / step) is exp(-(u - m)^2 step).
    """
    low, high = clipped_range(x, factor)
    low, high = low.clamp(max=0), high.clamp(min=0)
    step = ((high - low) / (2**bits - 1)).clamp(min=1e-12)
    stride = -(-x.numel() // _MAX_ELEMENTS)
    values, low, step = (t.expand(x.shape).reshape(-1)[::stride, None] for t in (x.float(), low, step))
    levels = torch.arange(2**bits, device=x.device)
    assigned = torch.softmax(-((values - low) / step - levels).square() * step, 1).mean(0)
    return -(assigned * assigned.clamp(min=1e-30).log()).sum()


@contextmanager
def _outputs(model: nn.Module, adapter: ModelAdapter) -> Iterator[dict[str, Tensor]]:
    """The outputs of the merger (`tower`) and of the last decoder layer (`decoder`) while open."""
    found: dict[str, Tensor] = {}

    def keep(name: str) -> object:
        def hook(_: nn.Module, __: object, output: Tensor | tuple[Tensor, ...]) -> None:
            found[name] = output[0] if isinstance(output, tuple) else output

        return hook

    parts = {"tower": model.get_submodule(adapter.merger), "decoder": adapter.decoder_layers(model)[-1]}
    handles = [part.register_forward_hook(keep(name)) for name, part in parts.items()]  # type: ignore[arg-type]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _inputs(model: nn.Module, simulation: VisionSimulation) -> Iterator[dict[str, Tensor]]:
    """What the tower's linears read while open, as parts of the graph."""
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> object:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen[name] = args[0] if args[0].requires_grad else args[0].requires_grad_()

        return hook

    handles = [
        model.get_submodule(name).register_forward_pre_hook(keep(name))  # type: ignore[arg-type]
        for name in simulation.factors
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
