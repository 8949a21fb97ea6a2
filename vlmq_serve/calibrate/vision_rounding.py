"""The quantized vision tower inside the model: the decoder is calibrated on the features that will be served."""

from collections.abc import Mapping

from torch import nn

from vlmq_serve.calibrate.plan import Plan
from vlmq_serve.calibrate.report import LayerResult
from vlmq_serve.calibrate.rounding import round_all
from vlmq_serve.calibrate.work import WorkFolder
from vlmq_serve.format.weight import PackedWeight


def quantize_vision(
    model: nn.Module, plan: Plan, stored: WorkFolder | None
) -> tuple[LayerResult, Mapping[str, PackedWeight]]:
    """Round the tower of `model` in place (dequantized weights); `stored`: of an interrupted run, whose tower is taken
    where it has one. Returns what the work folder keeps."""
    index = plan.vision[0].layer
    result = stored.record(index) if stored is not None else None
    if stored is not None and result is not None:
        names, folder = [linear.name for linear in plan.vision if linear.scheme is not None], stored.packed()
        packed: Mapping[str, PackedWeight] = {name: folder[name] for name in names}
    else:
        result, packed = round_all(index, plan.vision, plan)
    tower = _root(model, plan)
    for linear in plan.vision:
        if linear.scheme is not None:
            weight = tower.get_submodule(linear.local).get_parameter("weight")
            weight.data.copy_(packed[linear.name].dequantize())
    return result, packed


def _root(model: nn.Module, plan: Plan) -> nn.Module:
    """The module that local names start from: some releases of transformers wrap the tower in a `vision_model`."""
    tower = model.get_submodule(plan.adapter.vision_tower)
    return getattr(tower, "vision_model", tower)
