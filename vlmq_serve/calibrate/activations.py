"""Fake quantization of the inputs of linears.

With [low, high] the range of a token, a channel or a tensor, 0 included, and b bits:

    s = (high - low) / (2^b - 1)      z = round(-low / s)      Q(x) = (clamp(round(x / s) + z, 0, 2^b - 1) - z) s

Clipped ranges (Q-VLM) span the quantiles 1 - p and p instead of the smallest and the largest value.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vlmq_serve.calibrate.simulation import ActivationScheme

_SMALLEST_STEP = 1e-12
_MAX_OBSERVED = 2**22
Range = tuple[Tensor, Tensor]


def fake_quantize(x: Tensor, low: Tensor, high: Tensor, bits: int) -> Tensor:
    """Q(x) in the dtype of x, computed in fp32; `low` and `high` broadcast against x.

    Differentiable in x and in the range: rounding passes gradients straight through.
    """
    levels = 2**bits - 1
    low, high = low.float().clamp(max=0), high.float().clamp(min=0)
    step = ((high - low) / levels).clamp(min=_SMALLEST_STEP)
    zero = _round(-low / step)
    return ((_round(x.float() / step) + zero).clamp(0, levels) - zero).mul(step).to(x.dtype)


def _round(x: Tensor) -> Tensor:
    return x + (x.round() - x).detach() if x.requires_grad else x.round()


def span(x: Tensor, scheme: ActivationScheme, percentile: float = 1.0) -> Range:
    """The range of x [..., K]: [..., 1] per token, [K] per channel, [1] for the tensor."""
    x = x.float()
    if scheme.range == "token":
        return -_upper_quantile(-x, percentile), _upper_quantile(x, percentile)
    rows = x.reshape(-1, x.shape[-1]).T if scheme.range == "channel" else x.reshape(1, -1)
    return -_upper_quantile(-rows, percentile)[:, 0], _upper_quantile(rows, percentile)[:, 0]


def _upper_quantile(x: Tensor, level: float) -> Tensor:
    """Quantile of the last dimension, kept as 1, for levels near 1: only the largest values are sorted."""
    if level == 1:
        return x.amax(-1, keepdim=True)
    position = level * (x.shape[-1] - 1)
    below = int(position)
    top = x.topk(x.shape[-1] - below, -1).values
    upper = top[..., -2:-1] if top.shape[-1] > 1 else top
    return torch.lerp(top[..., -1:], upper, position - below)


@dataclass(frozen=True)
class InputQuantizer:
    """Q for one linear; `fixed` is its static range, without one the range is taken from the input itself.

    `scales` [K]: Q(x / s) s, what the linear would see behind folded channel scales.
    """

    scheme: ActivationScheme
    percentile: float = 1.0
    fixed: Range | None = None
    scales: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        if self.scales is not None:
            x = (x.float() / self.scales).to(x.dtype)
        low, high = self.fixed or span(x, self.scheme, self.percentile)
        quantized = fake_quantize(x, low.to(x.device), high.to(x.device), self.scheme.bits)
        return quantized if self.scales is None else (quantized.float() * self.scales).to(x.dtype)


def observe(scheme: ActivationScheme, inputs: Iterable[Tensor], percentile: float = 1.0) -> InputQuantizer:
    """The quantizer of a linear that reads `inputs` [..., K]; with a static range, that of all their tokens.

    Exact with percentile 1; for quantiles, every nth token of a batch so that about 2^22 values are kept per batch.
    """
    if not scheme.is_static:
        return InputQuantizer(scheme, percentile)
    kept = [_thinned(x, percentile) for x in inputs]
    return InputQuantizer(scheme, percentile, fixed=span(torch.cat(kept), scheme, percentile))


def _thinned(x: Tensor, percentile: float) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    if percentile == 1:
        return torch.stack([rows.amin(0), rows.amax(0)])
    # A copy: a view would keep the whole batch in memory.
    return rows[:: max(rows.numel() // _MAX_OBSERVED, 1)].clone()


@contextmanager
def quantized_inputs(layer: nn.Module, quantizers: Mapping[str, InputQuantizer]) -> Iterator[None]:
    """While open, linears of `layer` read quantized inputs, by local name."""
    handles = [add_quantizer(layer.get_submodule(name), quantizer) for name, quantizer in quantizers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def add_quantizer(linear: nn.Module, quantizer: InputQuantizer) -> Any:
    """Quantize what `linear` reads from now on; the handle's `remove` ends it."""

    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (quantizer(args[0]), *args[1:])

    return linear.register_forward_pre_hook(hook)


def range_tensors(quantizers: Mapping[str, InputQuantizer]) -> dict[str, Tensor]:
    """Static ranges and percentiles as `NAME.low`, `NAME.high` and `NAME.percentile`, fp32 on the CPU."""
    tensors: dict[str, Tensor] = {}
    for name, quantizer in quantizers.items():
        tensors[f"{name}.percentile"] = torch.tensor([quantizer.percentile])
        for end, value in zip(("low", "high"), quantizer.fixed or (), strict=False):
            tensors[f"{name}.{end}"] = value.float().cpu().clone()
    return tensors


def read_quantizers(scheme: ActivationScheme, tensors: Mapping[str, Tensor]) -> dict[str, InputQuantizer]:
    """What `range_tensors` has written."""
    names = [key.removesuffix(".percentile") for key in tensors if key.endswith(".percentile")]
    fixed = {name: (tensors[f"{name}.low"], tensors[f"{name}.high"]) for name in names if f"{name}.low" in tensors}
    return {name: InputQuantizer(scheme, float(tensors[f"{name}.percentile"]), fixed.get(name)) for name in names}
