"""What serving keeps of a quantized weight, and the linear layer on top of it."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vlmq_serve.format.weight import PackedWeight
from vlmq_serve.kernels import choice, cpu, scratch
from vlmq_serve.kernels.gpu import gpu_of
from vlmq_serve.kernels.integer import prepare_integer
from vlmq_serve.kernels.nibbles import ROW_PAD, int4_kernel_block
from vlmq_serve.kernels.op import ensure_integer, ensure_registered, gemm
from vlmq_serve.kernels.plan import describe

if TYPE_CHECKING:
    from vlmq_serve.kernels.triton_path import Operand


@dataclass(frozen=True)
class PreparedWeight:
    """A weight in the layout of the path that multiplies with it; made by `prepare` only.

    Tensors and plain values, so that a module can hold the tensors as parameters and put the object together
    again. `zeros` is empty when the path has folded them in. `group_size` is the real one (K for a whole row).
    Layouts: `reference` as in the checkpoint; `cpu_int4` and `cpu_dequant` see `cpu`;
    `cpu_int16` and `cpu_int8` see `integer`; `triton…` see `planes`.
    """

    qdata: Tensor
    scales: Tensor
    zeros: Tensor
    bits: int
    group_size: int
    out_features: int
    in_features: int
    path: str

    @property
    def nbytes(self) -> int:
        """Bytes that stay in memory."""
        return sum(t.numel() * t.element_size() for t in (self.qdata, self.scales, self.zeros))


def prepare(
    weight: PackedWeight, dtype: torch.dtype, device: torch.device | str, path: str | None = None
) -> PreparedWeight:
    """Repack a checkpoint weight for activations of `dtype` on `device`; once, when a model is loaded.

    `path` forces one of `choice.PATHS`, as the environment variable VLMQ_KERNEL does; by default the device and
    the dtype decide. Raises `VLMQError` for a path that is unknown or cannot serve this case.
    """
    ensure_registered()
    device = torch.device(device)
    scheme = weight.scheme
    rows, cols = weight.shape
    path = choice.choose_path(scheme.bits, dtype, device, path)
    qdata, scales, zeros = (t.to(device) for t in _repack(weight, dtype, path))
    group = scheme.group_length(cols)
    prepared = PreparedWeight(qdata, scales, zeros, scheme.bits, group, rows, cols, path)
    family = ""
    if path in choice.TRITON_KINDS:
        family = _make_ready(prepared)
    elif path in choice.ACTIVATION_BITS:
        ensure_integer()
    choice.log_choice(path, scheme.bits, group, (rows, cols), dtype, prepared.nbytes, family)
    return prepared


def operand_of(weight: PreparedWeight) -> "Operand":
    """The weight as the Triton kernels take it."""
    from vlmq_serve.kernels.triton_path import Operand

    return Operand(weight.qdata, weight.scales, weight.bits, weight.group_size, weight.out_features, weight.in_features)


def _make_ready(weight: PreparedWeight) -> str:
    """Reserve scratch and compile all kernels that the weight can need; says what serves at which M."""
    from vlmq_serve.kernels import triton_path

    device, kind = weight.qdata.device, choice.TRITON_KINDS[weight.path]
    scratch.reserve(device)
    operand = operand_of(weight)
    if device.type == "cuda":
        triton_path.warm_up(operand, kind)
    return describe(triton_path.shape_of(operand), gpu_of(device), kind)


def _repack(weight: PackedWeight, dtype: torch.dtype, path: str) -> tuple[Tensor, Tensor, Tensor]:
    if path in choice.TRITON_KINDS:
        from vlmq_serve.kernels import planes

        return *planes.prepare_planes(weight, dtype), torch.empty(0, dtype=dtype, device=weight.qweight.device)
    if path in choice.ACTIVATION_BITS:
        return prepare_integer(weight)
    if path == choice.CPU_INT4:
        block = int4_kernel_block()
        return cpu.prepare_int4(weight, ROW_PAD if block is None else block)
    if path == choice.CPU_DEQUANT:
        return cpu.prepare_dequant(weight, ROW_PAD)
    zeros = weight.zeros
    empty = torch.empty(0, dtype=torch.uint8, device=weight.qweight.device)
    return weight.qweight, weight.scales, empty if zeros is None else zeros


def linear(x: Tensor, weight: PreparedWeight, bias: Tensor | None = None) -> Tensor:
    """x [..., K] @ W.T + bias, [..., N] in the dtype of x."""
    w = weight
    y = gemm(x, w.qdata, w.scales, w.zeros, w.bits, w.group_size, w.out_features, w.path)
    return y if bias is None else y + bias
