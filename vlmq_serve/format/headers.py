"""What a checkpoint folder holds, read from safetensors headers only (no tensor is loaded)."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmq_serve.format.config import QuantizationSpec
from vlmq_serve.format.errors import VLMQError
from vlmq_serve.format.scheme import SUFFIXES, tensor_shapes

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
NAMES_HASH = "tensor_names"
_MAX_HEADER = 100 * 2**20


@dataclass(frozen=True)
class TensorInfo:
    """One tensor as its header describes it; dtype in safetensors' spelling (`BF16`, `I32`, `U8`)."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object, with one clear error when it is missing or broken."""
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise VLMQError(f"{path}: no such file; is {path.parent} a Hugging Face model folder?") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise VLMQError(f"{path}: not valid JSON ({error}); copy the file again from its source") from None
    if not isinstance(loaded, dict):
        raise VLMQError(f"{path}: got a JSON {type(loaded).__name__}, expected an object")
    return loaded


def read_header(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Tensors and metadata of one shard; a truncated or damaged file is a `VLMQError`."""
    size = path.stat().st_size
    with path.open("rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER):
            raise VLMQError(f"{path}: truncated or not safetensors ({size} bytes); copy or write the file again")
        try:
            raw = json.loads(handle.read(length))
        except (json.JSONDecodeError, UnicodeDecodeError):
            raise VLMQError(f"{path}: damaged safetensors header; copy or write the file again") from None
    metadata = raw.pop("__metadata__", {})
    expected = 8 + length + max((entry["data_offsets"][1] for entry in raw.values()), default=0)
    if size != expected:
        raise VLMQError(f"{path}: got {size} bytes, its header says {expected}; the file is truncated, copy it again")
    infos = {}
    for name, entry in raw.items():
        begin, end = entry["data_offsets"]
        infos[name] = TensorInfo(path, entry["dtype"], tuple(entry["shape"]), end - begin)
    return infos, metadata


def shard_files(folder: Path) -> list[Path]:
    """Shards of a model folder in order; missing ones are a `VLMQError`."""
    index = folder / INDEX_FILE
    if index.exists():
        names = sorted(set(read_json(index).get("weight_map", {}).values()))
    elif (folder / SINGLE_FILE).exists():
        names = [SINGLE_FILE]
    else:
        raise VLMQError(f"{folder}: found neither {SINGLE_FILE} nor {INDEX_FILE}; only safetensors models are read")
    missing = [name for name in names if not (folder / name).exists()]
    if missing:
        raise VLMQError(f"{folder}: {INDEX_FILE} names {missing}, which are not there; download the model again")
    return [folder / name for name in names]


def read_tensor_index(folder: Path) -> dict[str, TensorInfo]:
    """All tensors of a model folder by name."""
    tensors: dict[str, TensorInfo] = {}
    for path in shard_files(folder):
        tensors.update(read_header(path)[0])
    index = folder / INDEX_FILE
    promised = set(read_json(index).get("weight_map", {})) if index.exists() else set()
    lost = sorted(promised - set(tensors))
    if lost:
        raise VLMQError(f"{index}: promises {len(lost)} tensors that no shard holds, first {lost[0]!r}")
    return tensors


def quantized_modules(tensors: Mapping[str, TensorInfo]) -> list[str]:
    """Names of the linears that have at least one quantized tensor."""
    found = {name.rpartition(".")[0] for name in tensors if name.rpartition(".")[2] in SUFFIXES}
    return sorted(found)


def hash_names(names: Iterable[str]) -> str:
    """`COUNT:SHA256` of the sorted tensor names: shows later that no tensor got lost."""
    ordered = sorted(names)
    return f"{len(ordered)}:{hashlib.sha256(chr(10).join(ordered).encode()).hexdigest()}"


def find_problems(tensors: Mapping[str, TensorInfo], spec: QuantizationSpec) -> list[str]:
    """Faults of a checkpoint's tensors against its config, one line each: missing, lost or misshapen."""
    problems = []
    written, found = spec.hashes.get(NAMES_HASH), hash_names(tensors)
    if written not in (None, found):
        problems.append(
            f"tensor names: got {len(tensors)} tensors, {written.partition(':')[0]} were written; "
            "a tensor was removed or renamed after calibration"
        )
    for module in quantized_modules(tensors):
        scheme = spec.scheme_for(module)
        if scheme is None:
            problems.append(f"{module}: has quantized tensors, but config.json ignores it")
            continue
        problems += _module_problems(module, tensors, spec)
    return problems


def _module_problems(module: str, tensors: Mapping[str, TensorInfo], spec: QuantizationSpec) -> list[str]:
    scheme = spec.scheme_for(module)
    packed = tensors.get(f"{module}.qweight")
    if scheme is None or packed is None:
        return [f"{module}.qweight: missing"]
    out_features, words = packed.shape
    in_features, rest = divmod(words * 32, scheme.bits)
    try:
        expected = tensor_shapes(scheme, out_features, in_features) if rest == 0 else {}
    except VLMQError:
        expected = {}
    if not expected:
        return [f"{module}.qweight: got shape {packed.shape}, which does not fit {scheme} of config.json"]
    problems = []
    for suffix in SUFFIXES:
        info = tensors.get(f"{module}.{suffix}")
        if info is None and suffix in expected:
            problems.append(f"{module}.{suffix}: missing")
        elif info is not None and info.shape != expected.get(suffix):
            problems.append(f"{module}.{suffix}: got shape {info.shape}, expected {expected.get(suffix)} for {scheme}")
    return problems
