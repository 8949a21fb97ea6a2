"""Channel scales folded into the weights around them, so that the function of the layer stays the same.

For linears that read x, and s > 0 per input channel: `W x = (W diag(s)) (x / s)`. The division goes into what makes x:
the weight of a norm, or the rows of a linear before it (values before o_proj; up_proj before down_proj, since the
gate multiplies channel by channel). This is AWQ's equivalent transformation (Lin et al., MLSys 2024, section 3.2).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from vlmq_serve.calibrate.families.adapter import Producer


@dataclass
class Folded:
    """What folding has made of a layer: `weights` [N, K] fp32 of linears still to be quantized, by local name;
    `changed` tensors that the checkpoint stores dense (norm weights, biases), by local tensor name."""

    weights: dict[str, Tensor] = field(default_factory=dict)
    changed: dict[str, Tensor] = field(default_factory=dict)

    def weight(self, layer: nn.Module, linear: str) -> Tensor:
        """The linear's weight so far."""
        found = self.weights.get(linear)
        return layer.get_parameter(f"{linear}.weight").detach().float() if found is None else found


def producer_rows(producer_width: int, channels: int, head_dim: int | None) -> Tensor:
    """int64 [channels]: which row of the producer makes each channel.

    Values of `producer_width` rows are read by several query heads each: heads of one group stand next to each other.
    """
    rows = torch.arange(channels)
    if producer_width == channels or head_dim is None:
        return rows
    repeats = channels // producer_width
    return rows // (head_dim * repeats) * head_dim + rows % head_dim


def fold_norm(norm: Tensor, scales: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The norm's weight divided by scales [K], as `dtype` stores it, and the scales that this weight really applies.

    Readers are multiplied by the second, in fp32 before they are quantized, so that the rounding of the stored norm
    costs nothing. Channels whose norm weight is 0 keep scale 1.
    """
    before = norm.float()
    folded = (before / scales).to(dtype)
    usable = (folded != 0) & folded.isfinite()
    folded = torch.where(usable, folded, before.to(dtype))
    return folded, torch.where(usable, before / folded.float(), 1.0)


def fold(
    layer: nn.Module, producer: Producer, readers: Mapping[str, torch.dtype], scales: Tensor, folded: Folded
) -> None:
    """Put scales [K] of the readers' input into `folded` and the dense part (norm, bias) into `layer`.

    `readers`: local names and the dtype in which the checkpoint stores them. Scales of channels that one row of the
    producer makes must be equal.
    """
    module, dtype = layer.get_submodule(producer.module), next(iter(readers.values()))
    original = layer.get_parameter(f"{producer.module}.weight")
    if original.dim() == 1:
        stored, scales = fold_norm(original.detach(), scales, dtype)
        _store(layer, f"{producer.module}.weight", stored, folded)
    else:
        rows = producer_rows(original.shape[0], scales.shape[0], producer.head_dim and producer.head_dim(layer))
        per_row = torch.ones(original.shape[0], device=scales.device)
        per_row[rows.to(scales.device)] = scales
        folded.weights[producer.module] = folded.weight(layer, producer.module) / per_row[:, None]
        bias = getattr(module, "bias", None)
        if bias is not None:
            _store(layer, f"{producer.module}.bias", (bias.detach().float() / per_row).to(dtype), folded)
    for name in readers:
        folded.weights[name] = folded.weight(layer, name) * scales


def _store(layer: nn.Module, name: str, value: Tensor, folded: Folded) -> None:
    folded.changed[name] = value
    layer.get_parameter(name).data.copy_(value)
