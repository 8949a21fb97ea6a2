"""A checkpoint in the `pack-quantized` form of compressed-tensors, which vLLM opens without this package.

| ours | theirs | change |
|---|---|---|
| `X.qweight` int32 [N, K*b/32] | `X.weight_packed` | none: the same little-endian stream along K |
| `X.scales` [N, K/G] | `X.weight_scale` | none |
| `X.zeros` uint8 [N, K/G] | `X.weight_zero_point` int32 [N*b/32, K/G] | packed along N |
| - | `X.weight_shape` int64 [2] | N and K |

Embeddings are dequantized: vLLM's method for this form has none.

They count codes and zero points from -2^(b-1) and store them from 0, so that the stored numbers are ours.
"""

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from vlmq_serve.format.config import QuantizationSpec
from vlmq_serve.format.consistency import config_problems
from vlmq_serve.format.errors import VLMQError
from vlmq_serve.format.headers import (
    INDEX_FILE,
    TensorInfo,
    find_problems,
    quantized_modules,
    read_header,
    read_json,
    read_tensor_index,
    shard_files,
)
from vlmq_serve.format.names import EMBEDDINGS, HEAD, fused_groups, part_of_model
from vlmq_serve.format.packing import pack_codes
from vlmq_serve.format.scheme import CODES_PER_BLOCK, WORD_BITS, Scheme
from vlmq_serve.format.tensor_file import save_tensors
from vlmq_serve.format.weight import PackedWeight

_REPORT_FOLDER = "vlmq"
_HEAD_TARGET = f"re:.*{HEAD}"


def export_compressed_tensors(source: str | Path, out: str | Path) -> None:
    """Write `out` from the vlmq checkpoint `source`; nothing is left of `out` when it fails.

    Raises `VLMQError` for a faulty checkpoint and for rows that do not fill packed words.
    """
    source, out = Path(source), Path(out)
    config = read_json(source / "config.json")
    spec, tensors = _read(source, config)
    if out.exists():
        raise VLMQError(f"{out}: exists already; choose another output folder or remove it first")
    staging = out.with_name(out.name + ".writing")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        shutil.copytree(source, staging, ignore=shutil.ignore_patterns("*.safetensors", _REPORT_FOLDER, ".*"))
        weight_map: dict[str, str] = {}
        for path in shard_files(source):
            converted = _convert_shard(path, spec)
            save_tensors(converted, staging / path.name, {"format": "pt"})
            weight_map.update(dict.fromkeys(converted, path.name))
        if (source / INDEX_FILE).exists():
            _write_json(staging / INDEX_FILE, {"metadata": {}, "weight_map": weight_map})
        _write_json(staging / "config.json", {**config, "quantization_config": quantization_config(spec, tensors)})
        os.rename(staging, out)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def _read(source: Path, config: Mapping[str, Any]) -> tuple[QuantizationSpec, dict[str, TensorInfo]]:
    raw = config.get("quantization_config")
    if raw is None:
        raise VLMQError(f"{source}: is not quantized (no quantization_config in config.json)")
    spec, tensors = QuantizationSpec.from_dict(raw), read_tensor_index(source)
    problems = find_problems(tensors, spec) + config_problems(tensors, spec, config)
    if problems:
        raise VLMQError(f"{source}: {problems[0]}; `vlmq verify` lists everything")
    modules = _linears(tensors)
    for module in modules:
        rows, scheme = tensors[f"{module}.qweight"].shape[0], spec.scheme_for(module)
        if rows % CODES_PER_BLOCK and scheme is not None and not scheme.symmetric:
            # --symmetric would pass here, but vLLM's W4 kernel for CPUs wants whole blocks of rows in any case.
            remedy = "without --vision" if part_of_model(module) == "vision" else "with --symmetric (for GPUs)"
            raise VLMQError(
                f"{module}: {rows} rows do not divide by {CODES_PER_BLOCK}, so packed zero points do not fit; "
                f"calibrate {remedy}, or serve the checkpoint with vlmq"
            )
    return spec, tensors


def quantization_config(spec: QuantizationSpec, tensors: Mapping[str, TensorInfo]) -> dict[str, Any]:
    """The `quantization_config` of compressed-tensors: one group per scheme.

    The commonest scheme is that of every `Linear` which no other group names and `ignore` does not hold. Every plain
    linear is named in `ignore`: none can be missed.
    """
    modules = _linears(tensors)
    by_scheme: dict[Scheme, list[str]] = {}
    for module in modules:
        scheme = spec.scheme_for(module)
        assert scheme is not None  # the checkpoint was checked
        by_scheme.setdefault(scheme, []).append(module)
    common = max(by_scheme, key=lambda scheme: len(by_scheme[scheme]))
    groups = {}
    for index, (scheme, members) in enumerate(by_scheme.items()):
        targets = ["Linear"] if scheme == common else [_target(name) for name in _with_fused(members)]
        groups[f"group_{index}"] = {"targets": targets, "weights": _weights(scheme)}
    plain = {n.removesuffix(".weight") for n, i in tensors.items() if n.endswith(".weight") and len(i.shape) > 1}
    plain |= {name for name in quantized_modules(tensors) if part_of_model(name) == EMBEDDINGS}
    plain -= set(modules)
    head = [] if any(part_of_model(name) == HEAD for name in modules) else [_HEAD_TARGET]
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": [*_with_fused(plain), *head],
    }


def _with_fused(names: Iterable[str]) -> list[str]:
    """`names` and the layers that vLLM fuses them into. Not every model class says what it fuses: LLaVA-OneVision's
    does not for q, k and v of its tower."""
    return sorted({*names, *fused_groups(names)})


def _linears(tensors: Mapping[str, TensorInfo]) -> list[str]:
    return [name for name in quantized_modules(tensors) if part_of_model(name) != EMBEDDINGS]


def _target(name: str) -> str:
    """vLLM maps names with a dot to its own, so the head, which has none in most models, is an expression."""
    return _HEAD_TARGET if part_of_model(name) == HEAD else name


def _weights(scheme: Scheme) -> dict[str, Any]:
    whole_row = scheme.group_size == -1
    return {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": scheme.symmetric,
        "strategy": "channel" if whole_row else "group",
        "group_size": None if whole_row else scheme.group_size,
        "dynamic": False,
    }


def convert_linear(name: str, tensors: Mapping[str, Tensor], scheme: Scheme) -> dict[str, Tensor]:
    """The tensors of one linear, ours (`qweight`, `scales`, `zeros` by suffix) to theirs."""
    qweight = tensors["qweight"]
    shape = torch.tensor([qweight.shape[0], qweight.shape[1] * WORD_BITS // scheme.bits], dtype=torch.int64)
    converted = {
        f"{name}.weight_packed": qweight,
        f"{name}.weight_scale": tensors["scales"],
        f"{name}.weight_shape": shape,
    }
    if "zeros" in tensors:
        converted[f"{name}.weight_zero_point"] = pack_codes(tensors["zeros"].T, scheme.bits).T.contiguous()
    return converted


def _convert_shard(path: Path, spec: QuantizationSpec) -> dict[str, Tensor]:
    infos, _ = read_header(path)
    packed = set(quantized_modules(infos))
    converted: dict[str, Tensor] = {}
    linears: dict[str, dict[str, Tensor]] = {}
    with safe_open(path, framework="pt") as shard:
        for key in infos:
            module, _, suffix = key.rpartition(".")
            # The bias of a quantized linear stays as it is.
            if module in packed and suffix in ("qweight", "scales", "zeros"):
                linears.setdefault(module, {})[suffix] = shard.get_tensor(key)
            else:
                converted[key] = shard.get_tensor(key)
    for module, tensors in linears.items():
        scheme = spec.scheme_for(module)
        assert scheme is not None  # the checkpoint was checked
        if part_of_model(module) == EMBEDDINGS:
            weight = PackedWeight(tensors["qweight"], tensors["scales"], tensors.get("zeros"), scheme)
            converted[f"{module}.weight"] = weight.dequantize(weight.scales.dtype)
        else:
            converted.update(convert_linear(module, tensors, scheme))
    return converted


def _write_json(path: Path, content: Mapping[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
