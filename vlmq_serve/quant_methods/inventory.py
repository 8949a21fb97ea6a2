"""What a checkpoint folder holds, read before anything is loaded: faults end the start with one clear error."""

from dataclasses import dataclass
from pathlib import Path

import torch

from vlmq_serve.format.config import QuantizationSpec
from vlmq_serve.format.consistency import config_problems
from vlmq_serve.format.errors import VLMQError
from vlmq_serve.format.headers import find_problems, quantized_modules, read_json, read_tensor_index

_FLOATS = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


@dataclass(frozen=True)
class Inventory:
    """Quantized linears of a checkpoint by Hugging Face name, and the dtype of their scales."""

    modules: frozenset[str]
    scales_dtype: torch.dtype


def read_inventory(folder: Path, spec: QuantizationSpec) -> Inventory | None:
    """Check every shard header of `folder` against `spec`; None where there are no safetensors files to check.

    Reads headers only, so it costs milliseconds. Raises `VLMQError` for a truncated or missing shard, a tensor that
    was removed, shapes that do not fit the bits and group size of config.json, and a config that contradicts itself.
    """
    if not any(folder.glob("*.safetensors*")):
        return None
    tensors = read_tensor_index(folder)
    problems = find_problems(tensors, spec) + config_problems(tensors, spec, read_json(folder / "config.json"))
    if problems:
        others = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise VLMQError(
            f"{folder}: checkpoint damaged: {problems[0]}{others}; "
            f"`vlmq verify` lists everything, copy the checkpoint again or calibrate again"
        )
    scales = next(info.dtype for name, info in tensors.items() if name.endswith(".scales"))
    return Inventory(frozenset(quantized_modules(tensors)), _FLOATS[scales])
