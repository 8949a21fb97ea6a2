"""What a checkpoint folder holds, read before anything is loaded: faults end the start with one clear error."""

from dataclasses import dataclass
from pathlib import Path

import torch

from vlmq_serve.format.config import QuantizationSpec
from vlmq_serve.format.errors import VLMQError
from vlmq_serve.format.headers import TensorInfo, find_problems, quantized_modules, read_tensor_index

_FLOATS = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


@dataclass(frozen=True)
class Inventory:
    """Quantized linears of a checkpoint by Hugging Face name, and the dtype of their scales."""

    modules: frozenset[str]
    scales_dtype: torch.dtype


def read_inventory(folder: Path, spec: QuantizationSpec) -> Inventory | None:
    """Check every shard header of `folder` against `spec`; None where there are no safetensors files to check.

    Reads headers only, so it costs milliseconds. Raises `VLMQError` for a truncated or missing shard, a tensor that
    was removed, and shapes that do not fit the bits and group size of config.json.
    """
    if not any(folder.glob("*.safetensors*")):
        return None
    tensors = read_tensor_index(folder)
    problems = find_problems(tensors, spec)
    if problems:
        others = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise VLMQError(
            f"{folder}: checkpoint damaged: {problems[0]}{others}; "
            f"`vlmq inspect` lists everything, copy the checkpoint again or calibrate again"
        )
    return Inventory(frozenset(quantized_modules(tensors)), _scales_dtype(folder, tensors))


def _scales_dtype(folder: Path, tensors: dict[str, TensorInfo]) -> torch.dtype:
    found = {info.dtype for name, info in tensors.items() if name.endswith(".scales")}
    if not found:
        raise VLMQError(f"{folder}: config.json says vlmq, but no tensor is quantized; calibrate the model first")
    if len(found) > 1 or not found <= _FLOATS.keys():
        raise VLMQError(f"{folder}: scales: got dtypes {sorted(found)}, expected one of {sorted(_FLOATS)}")
    return _FLOATS[found.pop()]
