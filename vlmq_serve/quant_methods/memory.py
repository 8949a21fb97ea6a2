"""Memory that loading has freed, given back to the system."""

import ctypes

import torch


def give_back_freed_memory(device: torch.device) -> None:
    """Have glibc return freed pages of its heaps; nothing to do for GPUs, and not possible with other C libraries.

    A layer's tensors are smaller than the size above which glibc maps memory of its own, which it raises with every
    large tensor that is freed. So what is freed after repacking stays with the process and is used for nothing.
    """
    if device.type != "cpu":
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
