"""The vision tower at few bits, by simulation: weights per row, inputs per token, both with a clipped range.

A checkpoint stores the tower as it is; what is described here exists in calibration and evaluation only. For a linear
with weight W [N, K], factors c_w and c_a in (0, 1] and [min, max] the range of a row or token:

    y = Q(x; c_a min x, c_a max x) Q(W; c_w min W, c_w max W)^T + bias
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vlmq_serve.calibrate.activations import fake_quantize
from vlmq_serve.calibrate.families.adapter import ModelAdapter
from vlmq_serve.format.names import is_under

SMALLEST_FACTOR = 0.2


@dataclass(frozen=True)
class Factors:
    """c_w and c_a of one linear, 0-d tensors or floats."""

    weights: Tensor | float = 1.0
    inputs: Tensor | float = 1.0


@dataclass(frozen=True)
class VisionSimulation:
    """Bits of the tower's weights and inputs, and the factors of its linears by module name."""

    weight_bits: int
    activation_bits: int
    factors: Mapping[str, Factors]

    def to_dict(self) -> dict[str, Any]:
        """Form in run.json: the factors as [c_w, c_a]."""
        factors = {name: [round(float(c), 5) for c in (f.weights, f.inputs)] for name, f in self.factors.items()}
        return {"weight_bits": self.weight_bits, "activation_bits": self.activation_bits, "factors": factors}

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> "VisionSimulation":
        factors = {name: Factors(*pair) for name, pair in raw["factors"].items()}
        return cls(raw["weight_bits"], raw["activation_bits"], factors)


def vision_linears(model: nn.Module, adapter: ModelAdapter) -> list[str]:
    """Names in `model` of the linears of the vision tower; what joins it to the decoder is left out."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and is_under(name, adapter.vision_tower) and not is_under(name, adapter.merger)
    ]


def clipped_range(x: Tensor, factor: Tensor | float) -> tuple[Tensor, Tensor]:
    """c min and c max over the last dimension, [..., 1] fp32."""
    x = x.detach().float()
    factor = torch.as_tensor(factor, dtype=torch.float32, device=x.device).clamp(SMALLEST_FACTOR, 1)
    return factor * x.amin(-1, keepdim=True), factor * x.amax(-1, keepdim=True)


@contextmanager
def quantized_tower(model: nn.Module, simulation: VisionSimulation) -> Iterator[None]:
    """While open, the tower's linears compute with quantized weights and inputs; gradients reach the factors."""
    handles = add_quantized_tower(model, simulation)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def add_quantized_tower(model: nn.Module, simulation: VisionSimulation) -> list[Any]:
    """The same without an end; each handle's `remove` ends it for one linear."""

    def hook_of(factors: Factors) -> Any:
        def hook(linear: nn.Linear, args: tuple[Tensor, ...], _: Tensor) -> Tensor:
            x = fake_quantize(args[0], *clipped_range(args[0], factors.inputs), simulation.activation_bits)
            ranges = clipped_range(linear.weight, factors.weights)
            weight = fake_quantize(linear.weight, *ranges, simulation.weight_bits)
            return nn.functional.linear(x, weight, linear.bias)

        return hook

    return [
        model.get_submodule(name).register_forward_hook(hook_of(factors))
        for name, factors in simulation.factors.items()
    ]
