"""What goes into and out of decoder layers: the first layer's real inputs, and taps at linears."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vlmq_serve.calibrate.families.adapter import BlockForward, ModelAdapter
from vlmq_serve.calibrate.samples import CalibrationSample

_NOT_FOR_LAYERS = ("past_key_values", "use_cache", "cache_position")
_MAX_PENDING = 256
MAX_PENDING_BYTES = 2**30
"""What waiting samples may hold; the images of 256 of 2,048 tokens each would be 10 GB with Qwen2-VL's processor."""


@dataclass(frozen=True)
class Batch:
    """Equally long samples: their indices, modality uint8 [B, T], the keyword arguments of decoder layers, and those of
    the module around them that the family asks for (CPU)."""

    indices: tuple[int, ...]
    modality: Tensor
    kwargs: Mapping[str, Any]
    decoder_inputs: Mapping[str, Any] = field(default_factory=dict)


class _StopForward(Exception):
    """Ends a forward pass at the module whose input was wanted."""


def group_by_length(samples: Iterable[CalibrationSample], max_tokens: int) -> Iterator[list[CalibrationSample]]:
    """Collect samples of equal length and equal shapes of input, up to `max_tokens` together; no padding anywhere.

    A length's group leaves when it is full; when many samples wait, the largest group leaves, so that no more than
    256 samples wait at once, nor, but for the last one, more bytes than `MAX_PENDING_BYTES`.
    """
    waiting: dict[tuple[int, tuple[tuple[str, tuple[int, ...]], ...]], list[CalibrationSample]] = {}
    for sample in samples:
        shapes = sorted((name, tuple(tensor.shape[1:])) for name, tensor in sample.inputs.items())
        key = (sample.length, tuple(shapes))
        group = waiting.setdefault(key, [])
        group.append(sample)
        if (len(group) + 1) * sample.length > max_tokens:
            yield waiting.pop(key)
        elif sum(map(_bytes, waiting.values())) > MAX_PENDING_BYTES:
            yield waiting.pop(max(waiting, key=lambda k: _bytes(waiting[k])))
        elif sum(map(len, waiting.values())) >= _MAX_PENDING:
            yield waiting.pop(max(waiting, key=lambda k: len(waiting[k])))
    while waiting:
        yield waiting.pop(next(iter(waiting)))


def _bytes(group: Iterable[CalibrationSample]) -> int:
    return sum(sample.nbytes for sample in group)


def batch_inputs(samples: Sequence[CalibrationSample], device: torch.device) -> dict[str, Tensor]:
    """Model inputs of equally long samples, one after the other along the first dimension."""
    return {key: torch.cat([sample.inputs[key] for sample in samples]).to(device) for key in samples[0].inputs}


def capture_first_inputs(
    model: nn.Module, adapter: ModelAdapter, samples: list[CalibrationSample], device: torch.device
) -> tuple[Tensor, Batch]:
    """Hidden states [B, T, C] that enter the first decoder layer, and the arguments that come with them.

    The model's own forward runs up to that layer, so embeddings, vision features, M-RoPE positions and masks are the
    ones of real inference.
    """
    caught: list[tuple[Tensor, dict[str, Any]]] = []

    def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs.pop("hidden_states")
        caught.append((hidden, kwargs))
        raise _StopForward

    wanted: dict[str, Any] = {}

    def keep(_: nn.Module, __: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        wanted.update({name: kwargs.get(name) for name in adapter.decoder_inputs})

    inputs = batch_inputs(samples, device)
    handles = [
        adapter.decoder(model).register_forward_pre_hook(keep, with_kwargs=True),
        adapter.decoder_layers(model)[0].register_forward_pre_hook(stop, with_kwargs=True),
    ]
    try:
        with torch.no_grad():
            model(**inputs, use_cache=False)
    except _StopForward:
        pass
    finally:
        for handle in handles:
            handle.remove()
    hidden, kwargs = caught[0]
    kept = {key: value for key, value in kwargs.items() if key not in _NOT_FOR_LAYERS}
    modality = torch.stack([s.modality for s in samples])
    cpu = torch.device("cpu")
    return hidden.cpu(), Batch(tuple(s.index for s in samples), modality, move(kept, cpu), move(wanted, cpu))


def move(value: Any, device: torch.device) -> Any:
    """Copy of nested tuples, lists and dicts with every tensor on `device`."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: move(entry, device) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(move(entry, device) for entry in value)
    return value


def linear_input(
    layer: nn.Module, forward: BlockForward, linear: str, hidden: Tensor, kwargs: Mapping[str, Any]
) -> Tensor:
    """Input of the linear called `linear` when a block of `layer` runs; it runs no further than that."""
    caught: list[Tensor] = []

    def stop(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        caught.append(args[0])
        raise _StopForward

    handle = layer.get_submodule(linear).register_forward_pre_hook(stop)
    try:
        forward(layer, hidden, kwargs)
    except _StopForward:
        pass
    finally:
        handle.remove()
    return caught[0]


def require_grad(output: Tensor) -> Tensor:
    """`change` of `output_taps` under autograd: the outputs of the first linears start the graph."""
    return output if output.requires_grad else output.requires_grad_()


@contextmanager
def output_taps(
    layer: nn.Module, linears: Iterable[str], change: Callable[[Tensor], Tensor] | None = None
) -> Iterator[dict[str, Tensor]]:
    """Collect the outputs of linears by name while the context is open; `change` may replace them on their way."""
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., Tensor]:
        def hook(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> Tensor:
            outputs[name] = output if change is None else change(output)
            return outputs[name]

        return hook

    handles = [layer.get_submodule(name).register_forward_hook(keep(name)) for name in linears]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()
