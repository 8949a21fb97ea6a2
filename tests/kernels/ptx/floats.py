"""16-bit floats in numpy: bf16 as its bits; operations are done in fp64, whose result is rounded to nearest."""

import numpy as np


def from_bf16(bits: np.ndarray) -> np.ndarray:
    """uint16 to float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_bf16(values: np.ndarray) -> np.ndarray:
    """float32 or float64 to uint16, to nearest, ties to even, subnormal numbers kept."""
    with np.errstate(over="ignore", invalid="ignore"):
        single = values.astype(np.float32)
        if not np.array_equal(single, values):
            # Rounded to fp32 first, some would be rounded twice.
            step = np.ldexp(1.0, np.maximum(np.frexp(values)[1] - 8, -133))
            single = np.where(np.isfinite(values), np.rint(values / step) * step, values).astype(np.float32)
    bits = single.view(np.uint32)
    nearest = bits + 0x7FFF + (bits >> 16 & 1)
    return (np.where(np.isnan(single), bits | 0x400000, nearest) >> 16).astype(np.uint16)


def from_half(bits: np.ndarray, bf16: bool) -> np.ndarray:
    """16 bits of bf16 or fp16 to float64."""
    return (from_bf16(bits) if bf16 else bits.view(np.float16)).astype(np.float64)


def to_half(values: np.ndarray, bf16: bool) -> np.ndarray:
    """float64 to 16 bits of bf16 or fp16."""
    if bf16:
        return to_bf16(values)
    with np.errstate(over="ignore"):
        return values.astype(np.float16).view(np.uint16)
