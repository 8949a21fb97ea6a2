"""What is rounded before the decoder, inside the model: the decoder is calibrated on what it will be given."""

from collections.abc import Mapping

from torch import nn

from vlmq_serve.calibrate.linear_plan import LinearPlan
from vlmq_serve.calibrate.plan import Plan
from vlmq_serve.calibrate.report import LayerResult
from vlmq_serve.calibrate.rounding import round_all
from vlmq_serve.calibrate.work import WorkFolder
from vlmq_serve.format.names import EMBEDDING_MODULE
from vlmq_serve.format.weight import PackedWeight

Rounded = tuple[LayerResult, Mapping[str, PackedWeight]]
"""What the work folder keeps of a part."""


def round_parts(model: nn.Module, plan: Plan, stored: WorkFolder | None) -> list[Rounded]:
    """Vision tower and embeddings of `model` with dequantized weights, and what is to be kept of them, on the CPU;
    `stored`: of an interrupted run, whose parts are taken where it has them."""
    found = []
    if plan.vision:
        found.append(_rounded(plan.vision, plan, stored))
        _replace_vision(model, plan, found[-1][1])
    if plan.embeddings:
        found.append(_rounded((plan.embeddings,), plan, stored))
        table = plan.adapter.decoder(model).get_submodule(EMBEDDING_MODULE)
        for packed in found[-1][1].values():  # none where no group fits
            weight = packed.dequantize(table.get_parameter("weight").dtype)
            # A parameter of its own: a tied head, on which gradients depend, keeps the weight that it has.
            table.weight = nn.Parameter(weight, requires_grad=False)
    return found


def _rounded(linears: tuple[LinearPlan, ...], plan: Plan, stored: WorkFolder | None) -> Rounded:
    index = linears[0].layer
    result = stored.record(index) if stored is not None else None
    if stored is None or result is None:
        return round_all(index, linears, plan)
    folder = stored.packed()
    return result, {linear.name: folder[linear.name] for linear in linears if linear.scheme is not None}


def _replace_vision(model: nn.Module, plan: Plan, packed: Mapping[str, PackedWeight]) -> None:
    tower = model.get_submodule(plan.adapter.vision_tower)
    # Local names start here: some releases of transformers wrap the tower in a `vision_model`.
    tower = getattr(tower, "vision_model", tower)
    for linear in plan.vision:
        if linear.scheme is not None:
            weight = tower.get_submodule(linear.local).get_parameter("weight")
            weight.data.copy_(packed[linear.name].dequantize())
