"""What the choice of a kernel needs to know about a GPU, asked once."""

from dataclasses import dataclass
from functools import lru_cache

import torch


@dataclass(frozen=True)
class Gpu:
    """arch: compute capability times ten, for example 90; processors: multiprocessors; memory: bytes; name: as the
    driver gives it, the key of the tables."""

    arch: int
    processors: int
    memory: int
    name: str = ""


ASSUMED = Gpu(80, 108, 40 << 30)
"""Where no device can be asked (the interpreter): an A100."""


@lru_cache(maxsize=16)
def gpu_of(device: torch.device) -> Gpu:
    """The GPU behind a device."""
    if device.type != "cuda":
        return ASSUMED
    properties = torch.cuda.get_device_properties(device)
    arch = 10 * properties.major + properties.minor
    return Gpu(arch, properties.multi_processor_count, properties.total_memory, properties.name)
