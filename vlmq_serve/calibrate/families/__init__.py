"""Model families: one file each, found by `model_type` of config.json."""

from pathlib import Path

from vlmq_serve.calibrate.families.adapter import ModelAdapter
from vlmq_serve.calibrate.families.qwen2_vl import QWEN2_VL
from vlmq_serve.format.errors import VLMQError
from vlmq_serve.format.headers import read_json

ADAPTERS: tuple[ModelAdapter, ...] = (QWEN2_VL,)


def find_adapter(folder: Path) -> ModelAdapter:
    """Adapter of the model in `folder`; an unknown family is a `VLMQError` that lists the known ones."""
    model_type = read_json(folder / "config.json").get("model_type")
    for adapter in ADAPTERS:
        if adapter.model_type == model_type:
            return adapter
    known = ", ".join(adapter.model_type for adapter in ADAPTERS)
    raise VLMQError(f"{folder}: got model_type {model_type!r}, supported: {known}")
