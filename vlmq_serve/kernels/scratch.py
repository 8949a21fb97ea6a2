"""One scratch buffer per GPU, shared by all layers: reserved when a model is loaded, before the memory that is left
is counted, and at a fixed address, as captured CUDA graphs need it.

Layers use it one after the other; products on two streams of one GPU at the same time would meet in it.
"""

from math import prod

import torch
from torch import Tensor

from vlmq_serve.kernels.gpu import gpu_of
from vlmq_serve.kernels.plan import scratch_bytes

_held: dict[torch.device, Tensor] = {}


def reserve(device: torch.device) -> None:
    """Allocate the buffer of a device; only the first call does anything."""
    probe = torch.empty(0, device=device).device
    if probe not in _held:
        _held[probe] = torch.empty(scratch_bytes(gpu_of(probe).memory), dtype=torch.uint8, device=probe)


def take(device: torch.device, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Uninitialised tensor in the buffer; one of its own where nothing was reserved or it does not fit."""
    size = prod(shape) * dtype.itemsize
    held = _held.get(device)
    if held is None or held.numel() < size:
        return torch.empty(shape, dtype=dtype, device=device)
    return held[:size].view(dtype).view(shape)
