"""What is timed: one callable per copy of the weight, so that no copy is still in a cache when its turn comes."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from vlmq_serve.format.weight import PackedWeight
from vlmq_serve.kernels import choice
from vlmq_serve.kernels.gpu import gpu_of
from vlmq_serve.kernels.plan import plan
from vlmq_serve.kernels.prepared import PreparedWeight, linear, operand_of, prepare

Call = Callable[[Tensor], Tensor]

DENSE, OURS, ON_REQUEST, PEER = "dense", "ours", "on request", "peer"
"""ON_REQUEST: ours too, but nobody is served by it who has not asked, so no summary takes it for our speed."""


@dataclass(frozen=True)
class Candidate:
    """One way to multiply with one weight.

    `kind` is DENSE, OURS, ON_REQUEST or PEER; `scheme` the weight's, or that of the weight which was dequantized.
    `calls` take x [M, K] of `dtype` and differ in nothing but the copy of the weight. `nbytes` is the size of one copy.
    `distinct`: whether it does anything of its own at this M, as a forced part of a family does where the family would
    not.
    """

    name: str
    kind: str
    scheme: str
    dtype: torch.dtype
    calls: tuple[Call, ...]
    nbytes: int
    distinct: Callable[[int], bool] = lambda _: True


PeerFactory = Callable[[PackedWeight, torch.dtype, int], Iterable[Candidate]]
"""(weight on the device, dtype of x, bytes to rotate over) to the peers that can serve it."""


def copies(nbytes: int, rotation: int) -> int:
    """Copies that together exceed `rotation` bytes."""
    return max(1, -(-rotation // max(1, nbytes)))


def dense(weight: PackedWeight, dtypes: Iterable[torch.dtype], rotation: int) -> Iterator[Candidate]:
    """torch's linear with the dequantized weight: cuBLAS on a GPU, oneDNN or MKL on a CPU."""
    exact = weight.dequantize()
    for dtype in dtypes:
        size = exact.numel() * dtype.itemsize
        matrices = [exact.to(dtype, copy=True) for _ in range(copies(size, rotation))]
        calls = tuple(_dense_call(matrix) for matrix in matrices)
        yield Candidate(f"torch {short(dtype)}", DENSE, str(weight.scheme), dtype, calls, size)


def ours(weight: PackedWeight, dtypes: Iterable[torch.dtype], rotation: int) -> Iterator[Candidate]:
    """Every path of this package that can serve the weight here, but for the plain reference."""
    device = weight.qweight.device
    for dtype in dtypes:
        for path in choice.available_paths(weight.scheme.bits, dtype, device):
            if path == choice.REFERENCE:
                continue
            prepared = prepare(weight, dtype, device, path)
            clones = [_clone(prepared) for _ in range(copies(prepared.nbytes, rotation))]
            calls = tuple(_our_call(clone) for clone in clones)
            name = f"{path} {short(dtype)}"
            distinct = partial(_distinct, prepared)
            kind = ON_REQUEST if path == choice.CPU_INT8 else OURS
            yield Candidate(name, kind, str(weight.scheme), dtype, calls, prepared.nbytes, distinct)


def short(dtype: torch.dtype) -> str:
    """`bf16`, `fp16` or `fp32`."""
    return {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype]


def _distinct(prepared: PreparedWeight, rows: int) -> bool:
    """Whether a forced part of the Triton family runs something else than the family at this M."""
    if prepared.path not in choice.TRITON_KINDS or prepared.path == choice.TRITON:
        return True
    from vlmq_serve.kernels import triton_path

    shape, gpu = triton_path.shape_of(operand_of(prepared)), gpu_of(prepared.qdata.device)
    return plan(rows, shape, gpu, choice.TRITON_KINDS[prepared.path]).variant != plan(rows, shape, gpu).variant


def _clone(prepared: PreparedWeight) -> PreparedWeight:
    return replace(prepared, qdata=prepared.qdata.clone(), scales=prepared.scales.clone(), zeros=prepared.zeros.clone())


def _dense_call(matrix: Tensor) -> Call:
    return lambda x: functional.linear(x, matrix)


def _our_call(prepared: PreparedWeight) -> Call:
    return lambda x: linear(x, prepared)
