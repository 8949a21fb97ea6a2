"""Write a quantized checkpoint key by key from its source, atomically."""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import safe_open

from vlmq_serve.format.config import QuantizationSpec
from vlmq_serve.format.errors import VLMQError
from vlmq_serve.format.headers import (
    INDEX_FILE,
    NAMES_HASH,
    SINGLE_FILE,
    TensorInfo,
    hash_names,
    read_header,
    read_json,
    read_tensor_index,
    shard_files,
)
from vlmq_serve.format.names import HEAD, part_of_model
from vlmq_serve.format.tensor_file import save_tensors
from vlmq_serve.format.weight import PackedWeight

# Other forms of the same weights: copying them would ship the unquantized model along.
_OTHER_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx"}
_REPORT_FOLDER = "vlmq"


def read_tensors(folder: Path, names: list[str]) -> dict[str, torch.Tensor]:
    """Load the named tensors of a model folder."""
    index = read_tensor_index(folder)
    missing = [name for name in names if name not in index]
    if missing:
        raise VLMQError(f"{folder}: {len(missing)} tensors not found, first {missing[0]!r}")
    loaded = {}
    for path in {index[name].file for name in names}:
        with safe_open(path, framework="pt") as shard:
            loaded.update({name: shard.get_tensor(name) for name in names if index[name].file == path})
    return loaded


def write_checkpoint(
    source: Path,
    out: Path,
    packed: Mapping[str, PackedWeight],
    spec: QuantizationSpec,
    report: Path | None = None,
    changed: Mapping[str, torch.Tensor] | None = None,
    tied: Mapping[str, str] | None = None,
) -> None:
    """Write `out` as a copy of the model folder `source` with the weights of `packed` replaced.

    `changed` holds dense tensors that take the place of the source's by full name: norms and biases into which a
    method has folded scales. They are stored in the dtype of the source. `tied` maps a packed head that the source
    lacks to the embeddings that it was made from, which stay unless they are packed as well. With a packed head,
    config.json says that nothing is tied.

    `packed` maps linear names as they stand in the source (`X` for the tensor `X.weight`); it may load lazily, one
    shard's worth is held at a time. Files other than weights and config.json are copied byte for byte; a `report`
    folder becomes `out/vlmq`. All is written to `out.writing` and renamed at the end, so that a run that dies leaves
    no folder that looks finished. Raises `VLMQError` when `out` exists or the source does not fit.
    """
    tensors = read_tensor_index(source)
    config = read_json(source / "config.json")
    _check_request(source, out, packed, spec, tensors, config, tied or {})
    _check_changed(source, changed or {}, tensors)
    staging = out.with_name(out.name + ".writing")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        _copy_other_files(source, staging)
        weight_map: dict[str, str] = {}
        total = sum(
            _write_shard(path, staging / path.name, packed, changed or {}, tied or {}, weight_map)
            for path in shard_files(source)
        )
        if (source / INDEX_FILE).exists():
            _write_json(staging / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})
        hashed = replace(spec, hashes={**spec.hashes, NAMES_HASH: hash_names(weight_map)})
        plain = _untied(config) if any(part_of_model(name) == HEAD for name in packed) else config
        _write_json(staging / "config.json", {**plain, "quantization_config": hashed.to_dict()})
        if report is not None:
            shutil.copytree(report, staging / _REPORT_FOLDER)
        os.rename(staging, out)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def _check_request(
    source: Path,
    out: Path,
    packed: Mapping[str, PackedWeight],
    spec: QuantizationSpec,
    tensors: Mapping[str, TensorInfo],
    config: Mapping[str, object],
    tied: Mapping[str, str],
) -> None:
    if out.exists():
        raise VLMQError(f"{out}: exists already; choose another output folder or remove it first")
    if "quantization_config" in config:
        raise VLMQError(f"{source}: is quantized already (quantization_config in config.json); give the original model")
    unknown = [name for name in packed if tied.get(name, f"{name}.weight") not in tensors]
    if unknown:
        raise VLMQError(f"{source}: has no weight for {len(unknown)} quantized linears, first {unknown[0]!r}")
    mismatched = [name for name in packed if spec.scheme_for(name) is None]
    if mismatched:
        raise VLMQError(f"{mismatched[0]}: is quantized, but the ignore list {list(spec.ignore)} excludes it")
    spec.check_fused(packed)
    # Codes and scales take no more than the weights that they replace; a head that was tied comes on top.
    need = sum(info.nbytes for info in tensors.values()) + sum(packed[name].nbytes for name in tied)
    parent = next(p for p in out.absolute().parents if p.exists())
    free = shutil.disk_usage(parent).free
    if free < need:
        raise VLMQError(f"{parent}: {free / 2**30:.1f} GiB free, up to {need / 2**30:.1f} GiB needed; free some space")


def _check_changed(source: Path, changed: Mapping[str, torch.Tensor], tensors: Mapping[str, TensorInfo]) -> None:
    for name, tensor in changed.items():
        if name not in tensors or tensors[name].shape != tuple(tensor.shape):
            found = tensors[name].shape if name in tensors else "no such tensor"
            raise VLMQError(f"{source}: changed tensor {name!r} of shape {tuple(tensor.shape)}, the source has {found}")


def _copy_other_files(source: Path, staging: Path) -> None:
    for path in sorted(source.rglob("*")):
        relative = path.relative_to(source)
        hidden = any(part.startswith(".") for part in relative.parts)
        replaced = relative.as_posix() in ("config.json", INDEX_FILE, SINGLE_FILE)
        if hidden or replaced or not path.is_file() or path.suffix in _OTHER_WEIGHTS:
            continue
        target = staging / relative
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)


def _write_shard(
    path: Path,
    target: Path,
    packed: Mapping[str, PackedWeight],
    changed: Mapping[str, torch.Tensor],
    tied: Mapping[str, str],
    weight_map: dict[str, str],
) -> int:
    """Write one shard and note its tensors in `weight_map`; returns the bytes of its tensors."""
    infos, metadata = read_header(path)
    tensors: dict[str, torch.Tensor] = {}
    # From the embeddings come the embeddings themselves, a tied head, or both.
    made_from: dict[str, list[str]] = {}
    for name in packed:
        made_from.setdefault(tied.get(name, f"{name}.weight"), []).append(name)
    with safe_open(path, framework="pt") as shard:
        for key in infos:
            names = made_from.get(key, [])
            for name in names:
                weight = packed[name]
                if infos[key].shape != weight.shape:
                    raise VLMQError(f"{key}: source shape {infos[key].shape}, quantized shape {weight.shape}")
                tensors.update(weight.tensors(name))
            if set(names) <= set(tied):
                tensors[key] = shard.get_tensor(key)
                if key in changed:
                    tensors[key] = changed[key].to(tensors[key].dtype)
    save_tensors(tensors, target, metadata or {"format": "pt"})
    weight_map.update(dict.fromkeys(tensors, target.name))
    return sum(t.numel() * t.element_size() for t in tensors.values())


def _untied(config: Mapping[str, object]) -> dict[str, object]:
    """`config` for a head of its own; vLLM and transformers read the flag in both places."""
    text = config.get("text_config")
    nested = {"text_config": {**text, "tie_word_embeddings": False}} if isinstance(text, Mapping) else {}
    return {**config, **nested, "tie_word_embeddings": False}


def _write_json(path: Path, content: Mapping[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
