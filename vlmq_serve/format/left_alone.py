"""Which linears of a checkpoint are plain, and why."""

from collections import Counter
from collections.abc import Mapping

from vlmq_serve.format.config import QuantizationSpec
from vlmq_serve.format.headers import TensorInfo, quantized_modules
from vlmq_serve.format.names import is_under, kind_of
from vlmq_serve.format.scheme import CODES_PER_BLOCK


def left_alone(tensors: Mapping[str, TensorInfo], spec: QuantizationSpec) -> Counter[tuple[str, tuple[int, int], str]]:
    """Plain linears counted by (name without numbers, shape [N, K], reason). Embeddings are not linears."""
    quantized = set(quantized_modules(tensors))
    found: Counter[tuple[str, tuple[int, int], str]] = Counter()
    for tensor, info in tensors.items():
        name = tensor.removesuffix(".weight")
        if name == tensor or len(info.shape) != 2 or name in quantized or "embed" in name.rpartition(".")[2]:
            continue
        found[(kind_of(name), (info.shape[0], info.shape[1]), _reason(name, info.shape[1], spec))] += 1
    return found


def _reason(name: str, in_features: int, spec: QuantizationSpec) -> str:
    if in_features % CODES_PER_BLOCK:
        return f"K={in_features} is no multiple of {CODES_PER_BLOCK}"
    entry = next((entry for entry in spec.ignore if is_under(name, entry)), None)
    group = spec.scheme.group_length(in_features)
    if entry == name and in_features % group:
        return f"ignore list; groups of {group} do not divide K={in_features}"
    return "ignore list" if entry == name else f"ignore list: {entry}" if entry else "no linear of the model"
