"""Writes safetensors files that others may read as they read any new file."""

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write `path` with the permissions that the umask gives.

    safetensors 0.8 leaves them to the owner alone: vLLM as another user, as in a container, could not read the weights.
    """
    path.touch()
    mode = path.stat().st_mode
    save_file(dict(tensors), path, dict(metadata) if metadata else None)
    path.chmod(mode)
