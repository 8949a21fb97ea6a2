"""Are the numbers in a checkpoint such as a quantizer writes? Every tensor is read once, one at a time."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from vlmq_serve.format.config import QuantizationSpec
from vlmq_serve.format.headers import TensorInfo
from vlmq_serve.format.scheme import Scheme

LARGEST_SCALE = 1e4
"""Weights of language models are far below 1; a flipped exponent bit gives values far above this."""


def content_problems(
    tensors: Mapping[str, TensorInfo], spec: QuantizationSpec, on_tensor: Callable[[str], None] = lambda _: None
) -> list[str]:
    """One line for every tensor with a value that no quantizer writes; `on_tensor(name)` is called before each."""
    problems = []
    for name, tensor in _read_all(tensors):
        on_tensor(name)
        problem = tensor_problem(name, tensor, spec.scheme_for(name.rpartition(".")[0]))
        if problem is not None:
            problems.append(f"{name}: {problem}; copy the checkpoint again or calibrate again")
    return problems


def tensor_problem(name: str, tensor: Tensor, scheme: Scheme | None) -> str | None:
    """What is wrong with the values of one tensor, None when they are plausible."""
    suffix = name.rpartition(".")[2]
    if suffix == "qweight" and tensor.numel() > 1 and bool((tensor == tensor.flatten()[0]).all()):
        return "every word is the same, so nothing was written"
    if suffix == "zeros" and scheme is not None:
        outside = int((tensor > scheme.max_code).sum())
        return f"got {outside} zero points above {scheme.max_code}, the largest of {scheme}" if outside else None
    if not tensor.is_floating_point():
        return None
    wrong = int((~torch.isfinite(tensor)).sum())
    if wrong:
        return f"got {wrong} values that are not finite"
    if suffix == "scales" and tensor.numel():
        low, high = float(tensor.min()), float(tensor.max())
        if low <= 0 or high > LARGEST_SCALE:
            return f"got scales from {low:g} to {high:g}, expected positive ones up to {LARGEST_SCALE:g}"
    return None


def _read_all(tensors: Mapping[str, TensorInfo]) -> Iterator[tuple[str, Tensor]]:
    by_file: dict[Path, list[str]] = {}
    for name, info in tensors.items():
        by_file.setdefault(info.file, []).append(name)
    for path, names in by_file.items():
        with safe_open(path, framework="pt") as shard:
            for name in names:
                yield name, shard.get_tensor(name)
