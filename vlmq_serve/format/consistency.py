"""Does config.json fit the tensors of a checkpoint? Reads names and headers only: cheap enough for every load."""

from collections.abc import Mapping
from typing import Any

from vlmq_serve.format.config import QuantizationSpec
from vlmq_serve.format.errors import VLMQError
from vlmq_serve.format.headers import TensorInfo, quantized_modules
from vlmq_serve.format.names import EMBEDDINGS, HEAD, fused_groups, is_under, part_of_model

FLOATS = ("BF16", "F16", "F32")
EXPERTS = ".experts."
DTYPES = {"qweight": ("I32",), "scales": FLOATS, "zeros": ("U8",)}


def config_problems(tensors: Mapping[str, TensorInfo], spec: QuantizationSpec, config: Mapping[str, Any]) -> list[str]:
    """Faults that leave every tensor in its place and still give wrong answers or no start, one line each."""
    modules = quantized_modules(tensors)
    if not modules:
        return ["config.json says vlmq, but no tensor is quantized; calibrate the model first"]
    return [
        *_twice(tensors, modules),
        *_dtypes(tensors, modules),
        *_fused(tensors, modules, spec),
        *_unused(tensors, modules, spec),
        *_tied_head(modules, config),
        *_experts(tensors, spec),
    ]


def _twice(tensors: Mapping[str, TensorInfo], modules: list[str]) -> list[str]:
    return [
        f"{module}: has both a packed and a plain weight; vLLM takes one only, calibrate again"
        for module in modules
        if f"{module}.weight" in tensors
    ]


def _dtypes(tensors: Mapping[str, TensorInfo], modules: list[str]) -> list[str]:
    problems = []
    for module in modules:
        for suffix, allowed in DTYPES.items():
            info = tensors.get(f"{module}.{suffix}")
            if info is not None and info.dtype not in allowed:
                problems.append(f"{module}.{suffix}: got dtype {info.dtype}, expected {' or '.join(allowed)}")
    scales = sorted({tensors[f"{m}.scales"].dtype for m in modules if f"{m}.scales" in tensors})
    if len(scales) > 1:
        problems.append(f"scales: got dtypes {scales} in one checkpoint, expected one; calibrate again")
    return problems


def _fused(tensors: Mapping[str, TensorInfo], modules: list[str], spec: QuantizationSpec) -> list[str]:
    """Members of a layer that vLLM fuses must all be quantized alike, or all be plain."""
    plain = [name.removesuffix(".weight") for name in tensors if name.endswith(".weight")]
    quantized = set(modules)
    problems = []
    for fused, members in fused_groups([*modules, *plain]).items():
        packed = quantized.intersection(members)
        missing = sorted(set(members) - packed)
        if packed and missing:
            problems.append(
                f"{fused}: {missing[0]} is plain and {min(packed)} is quantized; vLLM fuses these into one layer, "
                "quantize all of them or none"
            )
        try:
            spec.check_fused(packed)
        except VLMQError as error:
            problems.append(str(error))
    return problems


def _unused(tensors: Mapping[str, TensorInfo], modules: list[str], spec: QuantizationSpec) -> list[str]:
    """An override that fits no quantized linear is a misspelt name, and its scheme would silently not be used."""
    return [
        f"overrides: {entry!r} fits no quantized linear; names look like {modules[0]!r}"
        for entry in spec.overrides
        if not any(is_under(module, entry) for module in modules)
    ]


def _tied_head(modules: list[str], config: Mapping[str, Any]) -> list[str]:
    heads = [module for module in modules if part_of_model(module) in (HEAD, EMBEDDINGS)]
    parts = {"config.json": config, "text_config": config.get("text_config") or {}}
    tied = [name for name, part in parts.items() if part.get("tie_word_embeddings")]
    if not heads or not tied:
        return []
    return [
        f"{heads[0]}: is quantized, but tie_word_embeddings is true in {' and '.join(tied)}, so vLLM would use one "
        "weight for head and embeddings; write tie_word_embeddings false in both places"
    ]


def _experts(tensors: Mapping[str, TensorInfo], spec: QuantizationSpec) -> list[str]:
    """Experts that the config quantizes: vLLM would ask for them, and no method of ours multiplies with them."""
    for tensor in tensors:
        module = tensor.rpartition(".")[0]
        if EXPERTS in f".{module}." and spec.scheme_for(module) is not None:
            return [
                f"{module}: got mixture-of-experts weights, vlmq quantizes dense linear layers; add the experts to "
                "`ignore` and calibrate again, or use a dense model"
            ]
    return []
