"""Load a checkpoint into transformers, with the weights of a vlmq checkpoint dequantized.

This is the reference that a served checkpoint is compared with: the same numbers, none of our kernels.
"""

from pathlib import Path
from typing import Any

import torch
import transformers

from vlmq_serve.calibrate.loading import load_model as load_dense
from vlmq_serve.format.config import QUANT_METHOD, QuantizationSpec
from vlmq_serve.format.errors import VLMQError
from vlmq_serve.format.headers import find_problems, quantized_modules, read_json, read_tensor_index
from vlmq_serve.format.scheme import SUFFIXES
from vlmq_serve.format.shards import read_tensors
from vlmq_serve.format.weight import PackedWeight

GENERATION_FILE = "generation_config.json"


def read_spec(folder: Path) -> QuantizationSpec | None:
    """The quantization of a model folder, None when it is not quantized; `VLMQError` when it is not ours."""
    raw = read_json(folder / "config.json").get("quantization_config")
    if raw is None:
        return None
    if raw.get("quant_method") != QUANT_METHOD:
        method = raw.get("quant_method")
        raise VLMQError(f"{folder}: got quant_method {method!r}; transformers loads bf16 and {QUANT_METHOD!r} here")
    return QuantizationSpec.from_dict(raw)


def read_packed(folder: Path, spec: QuantizationSpec) -> dict[str, PackedWeight]:
    """All quantized linears of a checkpoint by Hugging Face name; a faulty checkpoint is a `VLMQError`."""
    index = read_tensor_index(folder)
    problems = find_problems(index, spec)
    if problems:
        raise VLMQError(f"{folder}: {problems[0]}" + (f" (and {len(problems) - 1} more)" if problems[1:] else ""))
    names = [key for key in index if key.rpartition(".")[2] in SUFFIXES]
    tensors = read_tensors(folder, names)
    packed = {}
    for name in quantized_modules(index):
        scheme = spec.scheme_for(name)
        assert scheme is not None  # find_problems has seen to it
        qweight, scales, zeros = (tensors.get(f"{name}.{suffix}") for suffix in SUFFIXES)
        packed[name] = PackedWeight(qweight, scales, zeros, scheme)  # type: ignore[arg-type]  # not None: as above
    return packed


def dequantized_state(folder: Path, spec: QuantizationSpec, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The checkpoint's tensors with every quantized linear as a plain `X.weight` in `dtype`."""
    packed = read_packed(folder, spec)
    quantized = {key for name, weight in packed.items() for key in weight.tensors(name)}
    state = read_tensors(folder, [key for key in read_tensor_index(folder) if key not in quantized])
    state.update({f"{name}.weight": weight.dequantize(dtype) for name, weight in packed.items()})
    return state


def load_model(folder: str | Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Any:
    """A transformers model in `dtype` on `device` from a bf16 or vlmq model folder, in eval mode; `VLMQError` where
    transformers cannot read it."""
    folder = Path(folder)
    spec = read_spec(folder)
    if spec is None:
        return load_dense(folder, dtype).to(device)
    config = transformers.AutoConfig.from_pretrained(folder)
    # transformers does not know this method: the reference holds plain dequantized weights.
    del config.quantization_config
    architecture = getattr(transformers, (config.architectures or ["?"])[0], None)
    if architecture is None:
        raise VLMQError(f"{folder}: got architectures {config.architectures}, which this transformers does not have")
    state = dequantized_state(folder, spec, dtype)
    model = architecture.from_pretrained(None, config=config, state_dict=state, dtype=dtype)
    if (folder / GENERATION_FILE).is_file():
        # As from_pretrained(folder) and vLLM do: end tokens and penalties must be those of the original.
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    return model.to(device).eval()
