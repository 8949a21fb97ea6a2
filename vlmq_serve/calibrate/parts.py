"""What is quantized beside the decoder layers: head, embeddings, and the linears of the vision tower."""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

from vlmq_serve.calibrate.families.adapter import ModelAdapter
from vlmq_serve.calibrate.linear_plan import LinearPlan, plan_linear
from vlmq_serve.calibrate.recipe import Recipe
from vlmq_serve.format.config import QuantizationSpec
from vlmq_serve.format.errors import VLMQError
from vlmq_serve.format.headers import TensorInfo
from vlmq_serve.format.names import EMBEDDING_MODULE, HEAD, part_of_model

_HEADS = (HEAD, f"language_model.{HEAD}")


def left_alone(recipe: Recipe, adapter: ModelAdapter) -> tuple[str, ...]:
    """The recipe's ignore list, and what the family leaves alone, without what the recipe has a scheme for.

    The family's names are there whatever the recipe ignores: nothing else keeps vLLM from asking for a packed tower.
    """
    tower = adapter.vision_tower.rpartition(".")[2]
    named = ((HEAD, recipe.lm_head), (tower, recipe.vision), (EMBEDDING_MODULE, recipe.embeddings))
    asked = {name for name, scheme in named if scheme is not None}
    chosen = recipe.ignore or ()
    both = sorted(asked & set(chosen))
    if both:
        raise VLMQError(f"ignore: got {both[0]!r}, which has a scheme of its own in this recipe; remove one of the two")
    return (*chosen, *(name for name in adapter.left_alone if name not in asked and name not in chosen))


def plan_vision(
    tensors: Mapping[str, TensorInfo], adapter: ModelAdapter, recipe: Recipe, config: Mapping[str, Any], record: int
) -> tuple[LinearPlan, ...]:
    """All 2-d weights of the vision tower; those that vLLM does not build quantizable, or that do not fit, get no
    scheme and a reason. Empty where the recipe leaves the tower alone."""
    scheme = recipe.part_scheme("vision")
    if scheme is None:
        return ()
    if not adapter.vision_linears:
        raise VLMQError(
            f"vision: got {scheme} for {adapter.model_type!r}, whose vision tower vLLM builds without a quantization "
            "method; leave `vision` out"
        )
    spec = QuantizationSpec(scheme, _vision_overrides(recipe), recipe.ignore or ())
    unfit = "ignore" if recipe.unfit == "error" else recipe.unfit
    root = next((r for r in adapter.source_vision if any(name.startswith(f"{r}.") for name in tensors)), None)
    if root is None:
        tried = " and ".join(adapter.source_vision)
        raise VLMQError(f"vision: no tensors below {tried}; the checkpoint is incomplete, or leave `vision` out")
    plans = []
    for tensor, info in tensors.items():
        name = tensor.removesuffix(".weight")
        if not tensor.startswith(f"{root}.") or name == tensor or len(info.shape) != 2:
            continue
        local = name.removeprefix(f"{root}.")
        refusal = _refusal(adapter, config, local)
        wanted = None if refusal else spec.scheme_for(name)
        plan = plan_linear(tensors, name, record, local, wanted, unfit)
        plans.append(LinearPlan(name, record, local, plan.shape, plan.dtype, plan.scheme, refusal or plan.reason))
    if not any(plan.scheme for plan in plans):
        raise VLMQError(f"vision: {scheme} fits no linear of the vision tower ({plans[0].name}: {plans[0].reason})")
    return tuple(plans)


def plan_head(
    tensors: Mapping[str, TensorInfo], layers_prefix: str, recipe: Recipe, config: Mapping[str, Any], record: int
) -> LinearPlan | None:
    """The head; where it is tied to the embeddings, a head of its own is made from them."""
    scheme = recipe.part_scheme("lm_head")
    if scheme is None:
        return None
    unfit = recipe.unfit
    for name in _HEADS:
        if f"{name}.weight" in tensors:
            return plan_linear(tensors, name, record, HEAD, scheme, unfit)
    if not _is_tied(config):
        raise VLMQError("lm_head: has no weight and is not tied to the embeddings; the checkpoint is incomplete")
    name = _HEADS[layers_prefix.startswith("language_model.")]
    return plan_linear(tensors, name, record, HEAD, scheme, unfit, f"{_embedding_name(layers_prefix)}.weight")


def plan_embeddings(
    tensors: Mapping[str, TensorInfo],
    layers_prefix: str,
    recipe: Recipe,
    config: Mapping[str, Any],
    record: int,
    head: LinearPlan | None,
) -> LinearPlan | None:
    """The table of embeddings, whose rows are looked up and not multiplied; `head`: what becomes of the head."""
    scheme = recipe.part_scheme("embeddings")
    if scheme is None:
        return None
    kind = str((config.get("text_config") or config).get("model_type"))
    if not kind.startswith("qwen"):
        raise VLMQError(
            f"embeddings: got {scheme} for a decoder of type {kind!r}, whose embeddings vLLM builds without a name; "
            "leave `embeddings` out"
        )
    if (head is None or head.scheme is None) and _is_tied(config):
        raise VLMQError(
            f"embeddings: got {scheme}, but they are the head's weight too (tie_word_embeddings); give `lm_head` a "
            "scheme that fits it, such as w8, which makes a weight of its own for it"
        )
    name = _embedding_name(layers_prefix)
    return plan_linear(tensors, name, record, EMBEDDING_MODULE, scheme, recipe.unfit)


def _embedding_name(layers_prefix: str) -> str:
    return f"{layers_prefix.rpartition('.')[0]}.{EMBEDDING_MODULE}"


def _is_tied(config: Mapping[str, Any]) -> bool:
    text = config.get("text_config") or {}
    return bool(config.get("tie_word_embeddings") or text.get("tie_word_embeddings"))


def _vision_overrides(recipe: Recipe) -> dict[str, Any]:
    """Overrides that name the vision tower: `mlp.down_proj` means those of the decoder."""
    return {name: scheme for name, scheme in recipe.override_schemes.items() if part_of_model(name) == "vision"}


def _refusal(adapter: ModelAdapter, config: Mapping[str, Any], local: str) -> str | None:
    if not any(fnmatchcase(local, pattern) for pattern in adapter.vision_linears):
        return "vLLM builds it without a quantization method"
    return adapter.vision_refusal(config.get("vision_config") or {}, local)
