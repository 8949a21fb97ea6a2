"""One decoder layer through the kernels that would serve it, against the plain product with its dequantized weights."""

from collections.abc import Mapping
from pathlib import Path

import torch

from vlmq_serve import kernels
from vlmq_serve.format.config import QuantizationSpec
from vlmq_serve.format.headers import TensorInfo, quantized_modules
from vlmq_serve.format.names import EMBEDDINGS, part_of_model
from vlmq_serve.format.scheme import SUFFIXES
from vlmq_serve.format.shards import read_tensors
from vlmq_serve.format.weight import PackedWeight

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 2e-2, torch.float16: 1e-2}
"""Largest ||y - y_ref|| / ||y_ref||: rounding of inputs, scales and sums in the dtype, with room to spare."""
_ROWS = 4
_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


def pick_linears(tensors: Mapping[str, TensorInfo], spec: QuantizationSpec) -> list[str]:
    """All quantized linears of the first layer that has any, and the first of every scheme that this leaves out.

    Embeddings are looked up, not multiplied: what serves them is the reference.
    """
    modules = [name for name in quantized_modules(tensors) if part_of_model(name) != EMBEDDINGS]
    first = modules[0].rpartition(".")[0]
    layer = first.rpartition(".")[0] if ".layers." in first else first
    chosen = [module for module in modules if module.startswith(f"{layer}.")] or modules[:1]
    schemes = {spec.scheme_for(module) for module in chosen}
    for module in modules:
        if spec.scheme_for(module) not in schemes:
            schemes.add(spec.scheme_for(module))
            chosen.append(module)
    return chosen


def forward_error(folder: Path, module: str, spec: QuantizationSpec) -> tuple[float, str, torch.dtype]:
    """Relative error of one linear on random inputs (seed 0), the kernel path, and the dtype (of the scales).

    Runs on the CPU, whatever serves later: there is one source of truth for the numbers, not for the speed.
    """
    scheme = spec.scheme_for(module)
    assert scheme is not None  # callers take quantized modules only
    names = [f"{module}.{suffix}" for suffix in SUFFIXES if not (suffix == "zeros" and scheme.symmetric)]
    loaded = read_tensors(folder, names)
    qweight, scales, zeros = (loaded.get(f"{module}.{suffix}") for suffix in SUFFIXES)
    weight = PackedWeight(qweight, scales, zeros, scheme)  # type: ignore[arg-type]  # read_tensors has found them
    dtype = weight.scales.dtype
    x = torch.randn(_ROWS, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = x.float() @ weight.dequantize().T
    prepared = kernels.prepare(weight, dtype, "cpu")
    got = kernels.linear(x, prepared).float()
    error = float((got - expected).norm() / expected.norm().clamp(min=1e-30))
    return error, prepared.path, dtype


def forward_problems(folder: Path, modules: list[str], spec: QuantizationSpec) -> list[str]:
    """One line for every linear whose product differs from the reference by more than rounding."""
    problems = []
    for module in modules:
        error, path, dtype = forward_error(folder, module, spec)
        if not error <= TOLERANCE[dtype]:
            problems.append(
                f"{module}: {path} differs from the reference by {error:.2g} (relative), allowed {TOLERANCE[dtype]}; "
                "VLMQ_KERNEL=reference serves right answers slowly; please report this with what `vlmq inspect` prints"
            )
    return problems
