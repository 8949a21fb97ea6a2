"""Makes the plan of a calibration from config.json and safetensors headers alone."""

import posixpath
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from vlmq_serve.calibrate.families import find_adapter
from vlmq_serve.calibrate.families.adapter import ModelAdapter
from vlmq_serve.calibrate.linear_plan import LinearPlan, plan_linear
from vlmq_serve.calibrate.loading import resolve_model
from vlmq_serve.calibrate.parts import left_alone, plan_embeddings, plan_head, plan_vision
from vlmq_serve.calibrate.plan import Plan
from vlmq_serve.calibrate.recipe import PARTS, Recipe
from vlmq_serve.calibrate.settings import override_of
from vlmq_serve.calibrate.sources import taps_of
from vlmq_serve.format.companions import has_template, missing_files
from vlmq_serve.format.config import QuantizationSpec
from vlmq_serve.format.errors import VLMQError
from vlmq_serve.format.headers import TensorInfo, read_json, read_tensor_index
from vlmq_serve.format.names import is_under, part_of_model


def make_plan(model: str | Path, recipe: Recipe) -> Plan:
    """Check model and recipe against each other; every misfit is one `VLMQError`."""
    source = resolve_model(model)
    adapter = find_adapter(source)
    config = read_json(source / "config.json")
    recipe = recipe.model_copy(update={"ignore": left_alone(recipe, adapter)})
    if "quantization_config" in config:
        raise VLMQError(f"{source}: is quantized already (quantization_config in config.json); give the original model")
    _check_reading(source, adapter, recipe)
    tensors = read_tensor_index(source)
    prefix = adapter.source_prefix(tensors)
    _refuse_experts(tensors, prefix)
    layers = 0
    while f"{prefix}.{layers}.{adapter.linears[0]}.weight" in tensors:
        layers += 1
    spec = make_spec(recipe, {})
    names = [(f"{prefix}.{layer}.{local}", layer, local) for layer in range(layers) for local in adapter.linears]
    linears = tuple(plan_linear(tensors, *name, spec.scheme_for(name[0]), recipe.unfit) for name in names)
    vision = plan_vision(tensors, adapter, recipe, config, layers)
    head = plan_head(tensors, prefix, recipe, config, layers + 1)
    embeddings = plan_embeddings(tensors, prefix, recipe, config, layers + 2, head)
    _check_names(recipe, [linear.name for linear in linears], [linear.name for linear in vision], tensors)
    _check_weighted(recipe, adapter)
    total = sum(t.nbytes for t in tensors.values())
    plan = Plan(source, adapter, recipe, linears, layers, prefix, total, vision, head, embeddings)
    if not any(linear.scheme for linear in linears):
        raise VLMQError(f"ignore: {list(recipe.ignore or ())} leaves no decoder linear to quantize; remove entries")
    plan = share_scales_dtype(replace(plan, recipe=pin_schemes(recipe, plan.all_linears)))
    spec = make_spec(plan.recipe, {})
    spec.check_fused(linear.name for linear in plan.all_linears)
    ignored = next((linear for linear in plan.quantized if spec.scheme_for(linear.name) is None), None)
    if ignored is not None:
        raise VLMQError(
            f"ignore: an entry fits {ignored.name!r}, which is to be {ignored.scheme}; remove one of the two"
        )
    return plan


def _check_reading(source: Path, adapter: ModelAdapter, recipe: Recipe) -> None:
    """What files alone tell of the way from chats to hidden states; loading the processor tells the rest."""
    if recipe.needs_data:
        missing = missing_files(source)
        if not has_template(source):
            missing.append("chat template: found none; copy chat_template.jinja from the original model")
        if missing:
            raise VLMQError(f"{source}: {missing[0]}")
    if recipe.simulated_vision and adapter.decoder_inputs:
        raise VLMQError(
            f"simulated_vision: got model_type {adapter.model_type!r}, whose tower feeds several decoder layers; "
            "supported where it feeds the embeddings only"
        )


def share_scales_dtype(plan: Plan) -> Plan:
    """`plan` with scales of the dtype that most quantized weights have: vLLM allocates those of all layers alike, and
    some fine-tuned models hold a tower or single layers in fp32."""
    weights: Counter[torch.dtype] = Counter()
    for linear in plan.quantized:
        weights[linear.dtype] += linear.shape[0] * linear.shape[1]
    common = max(weights, key=lambda dtype: weights[dtype])
    linears, vision = (tuple(replace(x, scales_dtype=common) for x in part) for part in (plan.linears, plan.vision))
    head, embeddings = (x and replace(x, scales_dtype=common) for x in (plan.head, plan.embeddings))
    return replace(plan, linears=linears, vision=vision, head=head, embeddings=embeddings)


def pin_schemes(recipe: Recipe, linears: Sequence[LinearPlan]) -> Recipe:
    """`recipe` with overrides and ignored names added until it gives every linear the scheme of its plan."""
    ignore, overrides = list(recipe.ignore or ()), dict(recipe.overrides)
    for part in PARTS:
        scheme = recipe.part_scheme(part)
        chosen = [linear.name for linear in linears if linear.scheme and part_of_model(linear.name) == part]
        if scheme and chosen:
            # One entry for most of the part; the spec decides by the longest that fits.
            overrides.setdefault(_common_parent(chosen), override_of(scheme))
    pinned = recipe.model_copy(update={"overrides": overrides})
    spec = make_spec(pinned, {})
    for linear in linears:
        if linear.scheme is None and spec.scheme_for(linear.name) is not None:
            ignore.append(linear.name)
        elif linear.scheme is not None and spec.scheme_for(linear.name) != linear.scheme:
            overrides[linear.name] = override_of(linear.scheme)
    return recipe.model_copy(update={"overrides": overrides, "ignore": tuple(ignore)})


def _common_parent(names: Sequence[str]) -> str:
    """The longest module name that all of `names` lie below; the name itself where there is only one."""
    return posixpath.commonpath([name.replace(".", "/") for name in names]).replace("/", ".")


def _refuse_experts(tensors: Mapping[str, TensorInfo], prefix: str) -> None:
    found = next((name for name in tensors if name.startswith(f"{prefix}.") and ".experts." in name), None)
    if found is not None:
        raise VLMQError(
            f"{found}: got mixture-of-experts weights, vlmq quantizes dense linear layers; use a dense model"
        )


def make_spec(recipe: Recipe, hashes: dict[str, str], producer: str = "unknown") -> QuantizationSpec:
    """The `quantization_config` that a recipe leads to."""
    settings = recipe.model_dump(
        mode="json", exclude={"bits", "group_size", "symmetric", "overrides", "ignore", "method"}
    )
    return QuantizationSpec(
        recipe.scheme, recipe.override_schemes, recipe.ignore or (), recipe.method, settings, producer, hashes
    )


def _check_names(recipe: Recipe, linears: list[str], vision: list[str], tensors: dict[str, TensorInfo]) -> None:
    """A misspelt module name must not pass as one that fits nothing."""
    for entry in recipe.overrides:
        # Overrides of the tower name it: fc1 alone would pass here and change nothing.
        if not any(is_under(name, entry) for name in (vision if part_of_model(entry) == "vision" else linears)):
            raise VLMQError(
                f"overrides: {entry!r} fits no linear that is quantized; names look like {linears[0]!r} or 'down_proj' "
                "(head and embeddings have settings of their own, lm_head and embeddings)"
            )
    for entry in recipe.ignore or ():
        # lm_head has no tensor of its own where it is tied to the embeddings.
        if entry != "lm_head" and not any(is_under(name, entry) for name in tensors):
            raise VLMQError(
                f"ignore: {entry!r} fits no module; names look like {linears[0]!r}, 'visual' or 'down_proj'"
            )


def _check_weighted(recipe: Recipe, adapter: ModelAdapter) -> None:
    taps = taps_of(adapter, recipe.importance)
    for entry in recipe.weighted or ():
        if not any(is_under(name, entry) for name in taps):
            raise VLMQError(
                f"weighted: {entry!r} has no gradient of the {recipe.importance} loss; it has some at {', '.join(taps)}"
            )
