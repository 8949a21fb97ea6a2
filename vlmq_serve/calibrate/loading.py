"""Find, load and hash the model to calibrate."""

import hashlib
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from vlmq_serve.format.errors import VLMQError
from vlmq_serve.format.headers import shard_files

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_model(model: str | Path) -> Path:
    """A local model folder as it is; a hub id is downloaded (weights in safetensors only)."""
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    looks_local = isinstance(model, Path) or str(model).startswith((".", "/", "~")) or str(model).count("/") != 1
    if looks_local:
        raise VLMQError(f"model: got {str(model)!r}, which is no folder; give a model folder or a hub id ORG/NAME")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(model), ignore_patterns=["*.bin", "*.pth", "*.gguf", "*.onnx", "*.h5"]))
    except Exception as error:  # the hub client raises many kinds, all of them mean the same to the user
        detail = " ".join(str(error).split())[:200]
        raise VLMQError(f"model: {model!r} is no local folder and cannot be downloaded ({detail})") from None


def choose_device(name: str) -> torch.device:
    """`auto` (CUDA if there is one), `cpu`, `cuda` or `cuda:1`; `VLMQError` for a device that torch does not see."""
    return resolve_device(name, torch.cuda.device_count() if torch.cuda.is_available() else 0)


def resolve_device(name: str, gpus: int) -> torch.device:
    """`choose_device` on a machine with so many CUDA devices."""
    if name == "auto":
        return torch.device("cuda" if gpus else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise VLMQError(f"device: got {name!r}, allowed auto, cpu, cuda and cuda:0, cuda:1 ...")
    device = torch.device(name)
    if device.type == "cuda" and not gpus:
        raise VLMQError(
            f"device: got {name!r}, but torch sees no CUDA device; use device cpu, or install the CUDA build"
        )
    if device.type == "cuda" and (device.index or 0) >= gpus:
        raise VLMQError(f"device: got {name!r}, but torch sees {gpus} CUDA device(s), cuda:0 to cuda:{gpus - 1}")
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of activations and weights, `auto` resolved; statistics of a calibration are always fp32."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if name not in _DTYPES:
        raise VLMQError(f"dtype: got {name!r}, allowed auto, {', '.join(_DTYPES)}")
    return _DTYPES[name]


def load_model(folder: Path, dtype: torch.dtype) -> nn.Module:
    """The transformers model on the CPU, in evaluation mode, without parameter gradients."""
    from transformers import AutoModelForImageTextToText

    try:
        model = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype, local_files_only=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise VLMQError(f"{folder}: transformers cannot load the model ({_one_line(error)})") from None
    return model.eval().requires_grad_(False)


def load_processor(folder: Path) -> Any:
    """The model's own processor, with its chat template, or where it has none, as in vLLM, that of its tokenizer."""
    from transformers import AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise VLMQError(f"{folder}: transformers cannot load the processor ({_one_line(error)})") from None
    tokenizer = getattr(processor, "tokenizer", processor)
    if not tokenizer("text")["input_ids"]:
        raise VLMQError(f"{folder}: the tokenizer reads no text; copy tokenizer.json, or vocab.json and merges.txt")
    if getattr(processor, "chat_template", None) is None:
        processor.chat_template = tokenizer.chat_template
    if processor.chat_template is None:
        raise VLMQError(f"{folder}: the processor has no chat template; copy chat_template.jinja of its source")
    return processor


def hash_weights(folder: Path) -> str:
    """SHA-256 over the model's shards, in order."""
    total = hashlib.sha256()
    for path in shard_files(folder):
        with path.open("rb") as handle:
            total.update(hashlib.file_digest(handle, "sha256").digest())
    return total.hexdigest()


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:240]
