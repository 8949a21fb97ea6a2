"""What calibration must know of a model family."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from vlmq_serve.format.errors import VLMQError

AttentionBlock = Callable[[nn.Module, Tensor, Mapping[str, Any]], Tensor]


@dataclass(frozen=True)
class ModelAdapter:
    """Where things are in one family.

    `layers`, `vision_tower`, `merger` and `before_layers` are module paths in the loaded transformers model;
    `source_layers` the prefixes that the layers may have in safetensors files. `linear_groups` lists a decoder layer's
    linears in the order of quantization; linears of one group read the same input. `attention_block(layer, hidden,
    kwargs)` is the attention with its norm and its residual, [B, T, C] to [B, T, C]; `importance_taps` are the linears
    inside it. `check_config` raises `VLMQError` on variants that the family's code does not cover.
    """

    model_type: str
    layers: str
    source_layers: tuple[str, ...]
    linear_groups: tuple[tuple[str, ...], ...]
    importance_taps: tuple[str, ...]
    vision_tower: str
    merger: str
    before_layers: tuple[str, ...]
    attention_block: AttentionBlock
    image_token_id: Callable[[Any], int]
    merge_size: Callable[[Any], int]
    check_config: Callable[[Any], None]

    @property
    def linears(self) -> tuple[str, ...]:
        """All linears of a layer in order."""
        return tuple(name for group in self.linear_groups for name in group)

    def decoder_layers(self, model: nn.Module) -> nn.ModuleList:
        layers = model.get_submodule(self.layers)
        if not isinstance(layers, nn.ModuleList):
            raise VLMQError(f"{self.layers}: got {type(layers).__name__}, expected the list of decoder layers")
        return layers

    def source_prefix(self, tensor_names: Mapping[str, Any]) -> str:
        """The prefix that this checkpoint's files use for the layers."""
        for prefix in self.source_layers:
            if f"{prefix}.0.{self.linears[0]}.weight" in tensor_names:
                return prefix
        tried = ", ".join(f"{prefix}.0.{self.linears[0]}.weight" for prefix in self.source_layers)
        raise VLMQError(f"{self.model_type}: no decoder layers among the tensors; looked for {tried}")
