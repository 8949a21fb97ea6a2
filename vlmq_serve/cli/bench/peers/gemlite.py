"""GemLite, Triton kernels for GPUs."""

import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from vlmq_serve.format.weight import PackedWeight
from vlmq_serve.kernels.bench.candidates import PEER, Call, Candidate, copies, short

logger = logging.getLogger(__name__)


def gemlite_peers(weight: PackedWeight, dtype: torch.dtype, rotation: int) -> Iterator[Candidate]:
    """GemLite's linear; it has no 3-bit weights. Shapes that its shipped tables lack, such as any with 2 bits, it tunes
    in the first product of each M, which takes long."""
    if weight.scheme.bits == 3:
        return
    try:
        # Importing it asks for a CUDA device.
        calls, size = _gemlite_calls(weight, dtype, rotation)
    except Exception as error:
        logger.info("GemLite is not measured: %s: %s", type(error).__name__, error)
        return
    yield Candidate(f"GemLite {short(dtype)}", PEER, str(weight.scheme), dtype, calls, size)


def _gemlite_calls(weight: PackedWeight, dtype: torch.dtype, rotation: int) -> tuple[tuple[Call, ...], int]:
    from gemlite.core import DType, GemLiteLinearTriton

    scheme, (rows, cols) = weight.scheme, weight.shape
    kind = DType.BF16 if dtype == torch.bfloat16 else DType.FP16
    zeros: Any = scheme.mid_code if weight.zeros is None else weight.zeros.to(dtype)
    calls: list[Call] = []
    size = 0
    while not calls or len(calls) < copies(size, rotation):
        layer = GemLiteLinearTriton(scheme.bits, scheme.group_length(cols), cols, rows, kind, kind)
        layer.pack(weight.codes(), weight.scales.to(dtype), zeros, None)
        tensors = [t for t in layer.get_tensor_args() if isinstance(t, Tensor)]
        size = sum(t.numel() * t.element_size() for t in tensors)
        calls.append(layer.forward)
    return tuple(calls), size
