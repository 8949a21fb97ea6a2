"""What calibration must know of a model family."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from vlmq_serve.format.errors import VLMQError

BehindLayer = Callable[[int, Tensor, Mapping[str, Any]], Tensor]
BlockForward = Callable[[nn.Module, Tensor, Mapping[str, Any]], Tensor]


@dataclass(frozen=True)
class Producer:
    """The module before a group of linears, into which scales of their input channels can be folded: a norm, or a
    linear whose rows are these channels. `head_dim` of a layer, where several query heads read one row (values)."""

    module: str
    head_dim: Callable[[nn.Module], int] | None = None


@dataclass(frozen=True)
class ResidualBlock:
    """A part of a decoder layer, norm and residual included.

    `forward(layer, hidden, kwargs)` maps [B, T, C] to [B, T, C]. `linear_groups` lists its linears in the order of
    quantization; linears of one group read the same input. `importance_taps` are the linears whose output gradients
    weigh tokens (VLMQ: those of the attention). `producers`, one per group: what makes its input.
    """

    forward: BlockForward
    linear_groups: tuple[tuple[str, ...], ...]
    importance_taps: tuple[str, ...] = ()
    producers: tuple[Producer | None, ...] = ()


@dataclass(frozen=True)
class ModelAdapter:
    """Where things are in one family.

    `layers`, `vision_tower`, `merger` and `before_layers` are module paths in the loaded transformers model;
    `source_layers` the prefixes that the layers may have in safetensors files. `blocks`, one after the other, make up
    a decoder layer. `left_alone` are the modules that are not quantized unless a recipe says otherwise. `check_config`
    raises `VLMQError` on variants that the family's code does not cover. `behind_layer(index, hidden, inputs)` is what
    happens between a layer and the next, with the keyword arguments `decoder_inputs` of the module around the layers.
    `source_vision` are the prefixes that the tower may have in safetensors files; `vision_linears`, patterns below it,
    what vLLM builds quantizable; `vision_refusal(vision_config, local)` why it does not in a certain model.
    """

    model_type: str
    layers: str
    source_layers: tuple[str, ...]
    blocks: tuple[ResidualBlock, ...]
    vision_tower: str
    merger: str
    before_layers: tuple[str, ...]
    left_alone: tuple[str, ...]
    image_token_id: Callable[[Any], int]
    merge_size: Callable[[Any], int]
    check_config: Callable[[Any], None]
    source_vision: tuple[str, ...] = ()
    vision_linears: tuple[str, ...] = ()
    vision_refusal: Callable[[Mapping[str, Any], str], str | None] = lambda config, local: None
    decoder_inputs: tuple[str, ...] = ()
    behind_layer: BehindLayer | None = None

    @property
    def linears(self) -> tuple[str, ...]:
        """All linears of a layer in order."""
        return tuple(name for block in self.blocks for group in block.linear_groups for name in group)

    @property
    def attention(self) -> ResidualBlock:
        """The block whose tokens VLMQ weighs; its last group of linears makes its output."""
        return next(block for block in self.blocks if block.importance_taps)

    @property
    def importance_taps(self) -> tuple[str, ...]:
        """Linears whose output gradients weigh tokens in VLMQ, in order."""
        return self.attention.importance_taps

    def layer_forward(self, layer: nn.Module, hidden: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
        """The whole decoder layer, [B, T, C] to [B, T, C]."""
        for block in self.blocks:
            hidden = block.forward(layer, hidden, kwargs)
        return hidden

    def decoder_layers(self, model: nn.Module) -> nn.ModuleList:
        layers = model.get_submodule(self.layers)
        if not isinstance(layers, nn.ModuleList):
            raise VLMQError(f"{self.layers}: got {type(layers).__name__}, expected the list of decoder layers")
        return layers

    def decoder(self, model: nn.Module) -> nn.Module:
        """The module around the layers."""
        return model.get_submodule(self.layers.rpartition(".")[0])

    def source_prefix(self, tensor_names: Mapping[str, Any]) -> str:
        """The prefix that this checkpoint's files use for the layers."""
        for prefix in self.source_layers:
            if f"{prefix}.0.{self.linears[0]}.weight" in tensor_names:
                return prefix
        tried = ", ".join(f"{prefix}.0.{self.linears[0]}.weight" for prefix in self.source_layers)
        raise VLMQError(f"{self.model_type}: no decoder layers among the tensors; looked for {tried}")
