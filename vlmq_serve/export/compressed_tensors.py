"""A checkpoint in the `pack-quantized` form of compressed-tensors, which vLLM opens without this package.

| ours | theirs | change |
|---|---|---|
| `X.qweight` int32 [N, K*b/32] | `X.weight_packed` | none: the same little-endian stream along K |
| `X.scales` [N, K/G] | `X.weight_scale` | none |
| `X.zeros` uint8 [N, K/G] | `X.weight_zero_point` int32 [N*b/32, K/G] | packed along N |
| - | `X.weight_shape` int64 [2] | N and K |

They count codes and zero points from -2^(b-1) and store them from 0, so that the stored numbers are ours.
"""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
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
from vlmq_serve.format.packing import pack_codes
from vlmq_serve.format.scheme import CODES_PER_BLOCK, WORD_BITS, Scheme

_REPORT_FOLDER = "vlmq"


def export_compressed_tensors(source: Path, out: Path) -> None:
    """Write `out` from the vlmq checkpoint `source`; nothing is left of `out` when it fails.

    Raises `VLMQError` for a faulty checkpoint, for more than one scheme, and for rows that do not fill packed words.
    """
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
            converted = _convert_shard(path, spec.scheme)
            save_file(converted, staging / path.name, {"format": "pt"})
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
    modules = quantized_modules(tensors)
    schemes = sorted({str(spec.scheme_for(module)) for module in modules})
    if len(schemes) > 1:
        raise VLMQError(f"{source}: got the schemes {schemes}; the export takes checkpoints with one scheme only")
    for module in modules:
        rows = tensors[f"{module}.qweight"].shape[0]
        if rows % CODES_PER_BLOCK and not spec.scheme.symmetric:
            raise VLMQError(
                f"{module}: {rows} rows do not divide by {CODES_PER_BLOCK}, so packed zero points do not fit; "
                "calibrate with --symmetric, or serve the checkpoint with vlmq"
            )
    return spec, tensors


def quantization_config(spec: QuantizationSpec, tensors: Mapping[str, TensorInfo]) -> dict[str, Any]:
    """The `quantization_config` of compressed-tensors. Every plain linear is named in `ignore`: none can be missed."""
    scheme = spec.scheme
    weights = {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": scheme.symmetric,
        "strategy": "channel" if scheme.group_size == -1 else "group",
        "group_size": None if scheme.group_size == -1 else scheme.group_size,
        "dynamic": False,
    }
    plain = [n.removesuffix(".weight") for n, i in tensors.items() if n.endswith(".weight") and len(i.shape) > 1]
    packed = set(quantized_modules(tensors))
    head = [] if any(name.rpartition(".")[2] == "lm_head" for name in packed) else ["re:.*lm_head"]
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": [*sorted(set(plain) - packed), *head],
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


def _convert_shard(path: Path, scheme: Scheme) -> dict[str, Tensor]:
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
        converted.update(convert_linear(module, tensors, scheme))
    return converted


def _write_json(path: Path, content: Mapping[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
