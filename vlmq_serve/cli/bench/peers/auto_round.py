"""AutoRound's kernels for CPUs (`auto-round-lib`, imported as `auto_round_kernel`)."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vlmq_serve.format.weight import PackedWeight
from vlmq_serve.kernels.bench.candidates import PEER, Call, Candidate, copies, short

logger = logging.getLogger(__name__)


def auto_round_peers(weight: PackedWeight, dtype: torch.dtype, rotation: int) -> Iterator[Candidate]:
    """Its linear for CPUs, called as its `QuantLinear` does: products and scales in fp32, x converted to it and back.
    Other kinds of x have been seen to write where they must not (0.16.0)."""
    if weight.qweight.device.type != "cpu":
        return
    try:
        calls, size = _calls(weight, rotation)
    except Exception as error:
        logger.info("AutoRound's kernel is not measured: %s: %s", type(error).__name__, error)
        return
    yield Candidate(f"AutoRound {short(dtype)}", PEER, str(weight.scheme), dtype, calls, size)


def _calls(weight: PackedWeight, rotation: int) -> tuple[tuple[Call, ...], int]:
    import auto_round_kernel

    scheme, (rows, cols) = weight.scheme, weight.shape
    kind = (scheme.group_length(cols), "auto", f"int{scheme.bits}", "fp32", not scheme.symmetric)
    zeros = torch.empty(0, dtype=torch.int8) if weight.zeros is None else _signed(weight.zeros, scheme.mid_code)
    scales = weight.scales.float().t().contiguous()
    with _threads_kept():
        packed = auto_round_kernel.repack_quantized_weight(
            _signed(weight.codes(), scheme.mid_code), scales, zeros, *kind
        )
    calls = [
        partial(_multiply, auto_round_kernel.woqgemm, packed.clone(), (rows, cols, *kind))
        for _ in range(copies(packed.numel(), rotation))
    ]
    return tuple(calls), packed.numel()


def _signed(codes: Tensor, middle: int) -> Tensor:
    """[N, K] unsigned to [K, N] int8 around 0."""
    return (codes.to(torch.int32) - middle).to(torch.int8).t().contiguous()


def _multiply(kernel: Any, packed: Tensor, kind: tuple[Any, ...], x: Tensor) -> Tensor:
    with _threads_kept():
        y: Tensor = kernel(x.float(), packed, torch.empty(0), *kind)
    return y.to(x.dtype)


@contextmanager
def _threads_kept() -> Iterator[None]:
    """Its functions may leave the process with another number of OpenMP threads, for everybody."""
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
