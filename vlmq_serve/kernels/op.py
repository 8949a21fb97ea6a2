"""The custom operators: `vlmq::gemm_integer` for integer products on CPUs, `vlmq::gemm` for every other path; both
opaque to torch.compile."""

import hashlib
import threading
from functools import cache

import torch
from torch import Tensor

from vlmq_serve.kernels import choice, cpu, integer, native_build, native_op, reference

_WEIGHT = "Tensor qdata, Tensor scales, Tensor zeros, int bits"
SCHEMAS = (
    f"gemm(Tensor x, {_WEIGHT}, int group_size, int out_features, str path) -> Tensor",
    f"gemm_integer(Tensor x, {_WEIGHT}, int out_features, int x_bits) -> Tensor",
    f"gemm_dense(Tensor x, {_WEIGHT}, int out_features) -> Tensor",
)
"""The last is what the second calls for many rows on a CPU with AMX."""


_LOCK = threading.RLock()


def ensure_registered() -> None:
    """Register the operators; safe to call any number of times. `ensure_integer` implements `gemm_integer`."""
    with _LOCK:
        _library()


def ensure_integer() -> None:
    """Register the operators and implement `gemm_integer`, in C++ where that compiles; safe to call often."""
    with _LOCK:
        _implement_integer()


@cache
def _library() -> torch.library.Library:
    """The registrations live as long as this object, which the cache keeps."""
    library = torch.library.Library("vlmq", "FRAGMENT")
    for schema in SCHEMAS:
        library.define(schema)
    for key in ("CPU", "CUDA"):
        library.impl("gemm", _gemm, key)
    library.impl("gemm_dense", _gemm_dense, "CPU")
    torch.library.register_fake("vlmq::gemm", _gemm_fake, lib=library)
    torch.library.register_fake("vlmq::gemm_integer", _gemm_integer_fake, lib=library)
    return library


@cache
def _implement_integer() -> None:
    library = _library()
    if not native_op.register(integer.dense_rows()):
        library.impl("gemm_integer", _gemm_integer, "CPU")


@cache
def fingerprint() -> str:
    """Changes with what a compiled graph relies on: the operators and, with the C++, the layouts of weights."""
    parts = [*(schema.encode() for schema in SCHEMAS), *native_build.sources()]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def gemm(
    x: Tensor, qdata: Tensor, scales: Tensor, zeros: Tensor, bits: int, group_size: int, out_features: int, path: str
) -> Tensor:
    """x [..., K] times a prepared weight (the fields of `PreparedWeight`), [..., N] in the dtype of x.

    `prepare` registers the operators; in a process that was sent a prepared weight `ensure_integer` does, or
    `ensure_registered` for paths without integer products. Not done here, as torch.compile traces this.
    """
    x_bits = choice.ACTIVATION_BITS.get(path)
    y: Tensor
    if x_bits is None:
        y = torch.ops.vlmq.gemm.default(x, qdata, scales, zeros, bits, group_size, out_features, path)
    else:
        y = torch.ops.vlmq.gemm_integer.default(x, qdata, scales, zeros, bits, out_features, x_bits)
    return y


def _gemm(
    x: Tensor, qdata: Tensor, scales: Tensor, zeros: Tensor, bits: int, group_size: int, out_features: int, path: str
) -> Tensor:
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    if rows.shape[0] == 0:
        return x.new_empty((*x.shape[:-1], out_features))
    if path in choice.TRITON_KINDS:
        from vlmq_serve.kernels import triton_path

        weight = triton_path.Operand(qdata, scales, bits, group_size, out_features, rows.shape[1])
        y = triton_path.gemm(rows, weight, choice.TRITON_KINDS[path])
    elif path == choice.CPU_INT4:
        y = cpu.gemm_int4(rows, qdata, scales, zeros, out_features)
    elif path == choice.CPU_DEQUANT:
        y = cpu.gemm_dequant(rows, qdata, scales, zeros, out_features)
    elif path == choice.REFERENCE:
        y = reference.gemm(rows, qdata, scales, zeros, bits, group_size)
    else:
        raise ValueError(
            f"vlmq::gemm: got path {path!r}, which it does not have; delete graphs that an older version compiled"
        )
    return y if x.dim() == 2 else y.reshape(*x.shape[:-1], out_features)


def _gemm_fake(
    x: Tensor, qdata: Tensor, scales: Tensor, zeros: Tensor, bits: int, group_size: int, out_features: int, path: str
) -> Tensor:
    _check_devices("vlmq::gemm", x, qdata, scales, zeros)
    return x.new_empty((*x.shape[:-1], out_features))


def _gemm_integer(
    x: Tensor, qdata: Tensor, scales: Tensor, zeros: Tensor, bits: int, out_features: int, x_bits: int
) -> Tensor:
    integer.check(x, qdata, scales, zeros, bits, out_features, x_bits)
    y = integer.gemm_integer(x.reshape(-1, x.shape[-1]), qdata, scales, zeros, bits, out_features, x_bits)
    return y.reshape(*x.shape[:-1], out_features)


def _gemm_dense(x: Tensor, qdata: Tensor, scales: Tensor, zeros: Tensor, bits: int, out_features: int) -> Tensor:
    y = integer.gemm_dense(x.reshape(-1, x.shape[-1]), qdata, scales, zeros, bits, out_features)
    return y.reshape(*x.shape[:-1], out_features)


def _gemm_integer_fake(
    x: Tensor, qdata: Tensor, scales: Tensor, zeros: Tensor, bits: int, out_features: int, x_bits: int
) -> Tensor:
    _check_devices("vlmq::gemm_integer", x, qdata, scales, zeros)
    torch._check(x.shape[-1] * bits == qdata.shape[1] * 32, lambda: "vlmq::gemm_integer: K of x is not the weight's")
    return x.new_empty((*x.shape[:-1], out_features))


def _check_devices(name: str, x: Tensor, *weight: Tensor) -> None:
    """The dispatcher asks a fake implementation also where only some tensors are without data, as those of a weight
    that was never loaded; what it returns would be taken for numbers."""
    others = {str(t.device) for t in weight if t.device != x.device}
    torch._check(
        not others, lambda: f"{name}: got x on {x.device}, the weight on {', '.join(sorted(others))}; move one of them"
    )
