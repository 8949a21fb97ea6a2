"""The name of the machine that a number was measured on."""

import platform
from pathlib import Path

import torch


def device_name(device: torch.device | None = None) -> str:
    """The GPU's name; on a CPU its model and the vector instructions that torch uses. Default: CUDA if there is one.

    Family and model are part of a CPU's name, as virtual machines give unlike CPUs one model name.
    """
    if device is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    pairs = (line.partition(":")[::2] for line in reversed(lines))
    facts = {key.strip(): value.strip() for key, value in pairs}
    name = facts.get("model name", platform.machine())
    exact = f" family {facts['cpu family']} model {facts['model']}" if {"cpu family", "model"} <= facts.keys() else ""
    return f"{name}{exact}, {torch.backends.cpu.get_cpu_capability()}"
