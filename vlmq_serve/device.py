"""The name of the machine that a number was measured on."""

import platform
from pathlib import Path

import torch


def device_name(device: torch.device | None = None) -> str:
    """The GPU's name; on a CPU its model and the vector instructions that torch uses. Default: CUDA if there is one."""
    if device is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return f"{next(names, platform.machine())}, {torch.backends.cpu.get_cpu_capability()}"
