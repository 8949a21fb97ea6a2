"""Model families: one file each, found by `model_type` of config.json."""

from pathlib import Path

from vlmq_serve.calibrate.families.adapter import ModelAdapter
from vlmq_serve.calibrate.families.internvl import INTERNVL
from vlmq_serve.calibrate.families.llava_onevision import LLAVA_ONEVISION
from vlmq_serve.calibrate.families.qwen2_5_vl import QWEN2_5_VL
from vlmq_serve.calibrate.families.qwen2_vl import QWEN2_VL
from vlmq_serve.calibrate.families.qwen3_vl import QWEN3_VL
from vlmq_serve.format.errors import VLMQError
from vlmq_serve.format.headers import read_json

ADAPTERS: tuple[ModelAdapter, ...] = (QWEN2_VL, QWEN2_5_VL, QWEN3_VL, LLAVA_ONEVISION, INTERNVL)
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


def find_adapter(folder: Path) -> ModelAdapter:
    """Adapter of the model in `folder`; an unknown family is a `VLMQError` that lists the known ones."""
    config = read_json(folder / "config.json")
    model_type = config.get("model_type")
    parts = (config, config.get("text_config") or {})
    if any(part.get(key) for part in parts for key in _EXPERTS):
        raise VLMQError(
            f"{folder}: got {model_type!r} with mixture-of-experts layers; vlmq quantizes dense linear layers only, "
            "use a dense model of the family"
        )
    for adapter in ADAPTERS:
        if adapter.model_type == model_type:
            return adapter
    known = ", ".join(adapter.model_type for adapter in ADAPTERS)
    raise VLMQError(f"{folder}: got model_type {model_type!r}, supported: {known}")
