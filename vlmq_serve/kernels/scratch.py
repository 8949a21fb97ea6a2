"""Scratch of a GPU, shared by all layers: reserved when a model is loaded, before the memory that is left is counted,
and at a fixed address, as captured CUDA graphs need it.

One buffer for partial sums or dequantized weights, and one counter per tile of y, which only `triton_reduce` writes.
Layers use them one after the other; products on two streams of one GPU at the same time would meet in them.
"""

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from vlmq_serve.kernels.gpu import gpu_of
from vlmq_serve.kernels.plan import MAX_TILES, scratch_bytes


@dataclass(frozen=True)
class _Scratch:
    buffer: Tensor
    counters: Tensor


_held: dict[torch.device, _Scratch] = {}


def reserve(device: torch.device) -> None:
    """Allocate the scratch of a device; only the first call does anything."""
    probe = torch.empty(0, device=device).device
    if probe not in _held:
        buffer = torch.empty(scratch_bytes(gpu_of(probe).memory), dtype=torch.uint8, device=probe)
        _held[probe] = _Scratch(buffer, _new_counters(probe))


def take(device: torch.device, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Uninitialised tensor in the buffer; one of its own where nothing was reserved or it does not fit."""
    size = prod(shape) * dtype.itemsize
    held = _held.get(device)
    if held is None or held.buffer.numel() < size:
        return torch.empty(shape, dtype=dtype, device=device)
    return held.buffer[:size].view(dtype).view(shape)


def counters(device: torch.device) -> Tensor:
    """int32 [MAX_TILES], multiples of ARRIVALS between products."""
    held = _held.get(device)
    return _new_counters(device) if held is None else held.counters


def _new_counters(device: torch.device) -> Tensor:
    return torch.zeros(MAX_TILES, dtype=torch.int32, device=device)
