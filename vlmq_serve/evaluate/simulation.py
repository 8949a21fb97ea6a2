"""Runs a checkpoint as it was calibrated for: with simulated activations in transformers.

vLLM serves the weights alone, and so does `loading.load_model`; this is for the tables of methods.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from vlmq_serve.calibrate.activations import add_quantizer, read_quantizers
from vlmq_serve.calibrate.families import find_adapter
from vlmq_serve.calibrate.report import INPUTS_FILE, REPORT_FOLDER, RUN_FILE
from vlmq_serve.calibrate.simulation import ActivationScheme
from vlmq_serve.calibrate.vision import VisionSimulation, add_quantized_tower
from vlmq_serve.evaluate.loading import load_model, read_spec
from vlmq_serve.format.errors import VLMQError
from vlmq_serve.format.headers import read_json


def activation_scheme(folder: Path) -> ActivationScheme | None:
    """What the checkpoint's recipe says of activations; None: 16 bits."""
    spec = read_spec(folder)
    bits = None if spec is None else spec.settings.get("activation_bits")
    return None if spec is None or bits is None else ActivationScheme(bits, spec.settings["activation_range"])


def load_simulated(folder: str | Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Any:
    """`loading.load_model`, with fake quantization of what the quantized linears read, and of the vision
    tower where the calibration has simulated it."""
    folder = Path(folder)
    model = load_model(folder, dtype, device)
    scheme = activation_scheme(folder)
    if scheme is None:
        return model
    path = folder / REPORT_FOLDER / INPUTS_FILE
    if not path.is_file():
        raise VLMQError(f"{path}: missing; ranges of simulated activations are kept there, calibrate again")
    adapter = find_adapter(folder)
    layers = adapter.decoder_layers(model)
    for name, quantizer in read_quantizers(scheme, load_file(path)).items():
        index, _, local = name.partition(".")
        add_quantizer(layers[int(index)].get_submodule(local), quantizer)
    run = read_json(folder / REPORT_FOLDER / RUN_FILE)
    if "vision" in run:
        add_quantized_tower(model, VisionSimulation.from_dict(run["vision"]))
    return model
