"""Which path serves a weight: by device and dtype, or as VLMQ_KERNEL says."""

import logging
import os

import torch

from vlmq_serve.format.errors import VLMQError
from vlmq_serve.format.scheme import ALLOWED_BITS
from vlmq_serve.kernels import native
from vlmq_serve.kernels.nibbles import int4_kernel_block
from vlmq_serve.kernels.plan import AUTO, DENSE, FUSED, GEMV, SECOND_LAUNCH

REFERENCE = "reference"
CPU_INT4 = "cpu_int4"
CPU_DEQUANT = "cpu_dequant"
CPU_INT16 = "cpu_int16"
CPU_INT8 = "cpu_int8"
ACTIVATION_BITS = {CPU_INT16: 16, CPU_INT8: 8}
"""Paths with integer products, and the bits to which they round activations."""
TRITON = "triton"
TRITON_KINDS = {
    TRITON: AUTO, "triton_fused": FUSED, "triton_dense": DENSE, "triton_gemv": GEMV,
    "triton_second_launch": SECOND_LAUNCH,
}  # fmt: skip
"""Paths on the plane layout: by M, or a part of the family forced (`plan.KINDS`)."""
PATHS = (REFERENCE, CPU_INT16, CPU_INT8, CPU_INT4, CPU_DEQUANT, *TRITON_KINDS)
CPU_ORDER = (CPU_INT16, CPU_INT4, CPU_DEQUANT)
"""By preference; the later ones serve where our own kernels could not be compiled. Measured: docs/kernels.md. The user
has to ask for `cpu_int8`, as it is less exact than the activations that it is given."""
ENVIRONMENT = "VLMQ_KERNEL"
NIBBLE_BITS = (2, 3, 4)
"""Of the CPU paths that hold 4 bits at every width; all others hold each width that a checkpoint may have."""
ACTIVATIONS = (torch.float32, torch.float16, torch.bfloat16)

logger = logging.getLogger(__name__)
_logged: set[tuple[object, ...]] = set()


def choose_path(bits: int, dtype: torch.dtype, device: torch.device, forced: str | None = None) -> str:
    """Name of the path for weights of `bits` bits with activations of `dtype` on `device`.

    `forced` wins over the environment variable VLMQ_KERNEL, which wins over the automatic choice. Raises
    `VLMQError` for an unknown name and for a path that cannot serve this case.
    """
    if dtype not in ACTIVATIONS:
        raise VLMQError(f"activations: got {dtype}, allowed {[str(d) for d in ACTIVATIONS]}")
    path, asked = forced or os.environ.get(ENVIRONMENT) or None, "kernel" if forced else ENVIRONMENT
    if path is None:
        return _automatic(bits, dtype, device)
    if path not in PATHS:
        raise VLMQError(f"{asked}: got {path!r}, allowed {list(PATHS)}; leave it out for the automatic choice")
    reason = _refusal(path, bits, dtype, device)
    if reason:
        case = f"W{bits} with {dtype} on {device}"
        better = _automatic(bits, dtype, device)
        raise VLMQError(f"{asked}: got {path!r}, which cannot serve {case} ({reason}); use {better!r}")
    return path


def available_paths(bits: int, dtype: torch.dtype, device: torch.device) -> tuple[str, ...]:
    """Every path that can serve this case, the reference included."""
    return tuple(p for p in PATHS if not _refusal(p, bits, dtype, device))


def _automatic(bits: int, dtype: torch.dtype, device: torch.device) -> str:
    preferred = (TRITON,) if device.type == "cuda" else CPU_ORDER
    return next((p for p in preferred if not _refusal(p, bits, dtype, device)), REFERENCE)


def _refusal(path: str, bits: int, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why `path` cannot serve; None when it can."""
    if path == REFERENCE:
        return None
    held = NIBBLE_BITS if path in (CPU_INT4, CPU_DEQUANT) else ALLOWED_BITS
    if bits not in held:
        return f"it holds {held} bits"
    if path in TRITON_KINDS:
        if dtype == torch.float32:
            return "it multiplies in float16 or bfloat16"
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        return None if device.type == "cuda" or interpreted else "it needs an NVIDIA GPU"
    if device.type != "cpu":
        return "it runs on CPUs"
    if path in ACTIVATION_BITS and native.library() is None:
        return "it needs a C++ compiler and a CPU with AVX2"
    if path == CPU_INT4 and dtype != torch.bfloat16:
        return "torch's int4 kernel is fast for bfloat16 only"
    if path == CPU_INT4 and int4_kernel_block() is None:
        return "this torch has no int4 kernel of a known layout"
    return None


def log_choice(
    path: str, bits: int, group_size: int, shape: tuple[int, int], dtype: torch.dtype, nbytes: int, family: str = ""
) -> None:
    """One line per kind of layer, once per process; `family` says what serves at which M."""
    key = (path, bits, group_size, shape, dtype)
    if key in _logged:
        return
    _logged.add(key)
    bits_per_weight = 8 * nbytes / max(1, shape[0] * shape[1])
    family = f", {family}" if family else ""
    logger.info(
        "W%d group %d, N=%d K=%d, %s: %s (%.2f bits per weight in memory%s)",
        bits, group_size, *shape, str(dtype).removeprefix("torch."), path, bits_per_weight, family,
    )  # fmt: skip
