"""Quantized checkpoints for these tests, and ways to damage them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from vlmq_serve.calibrate.pipeline import calibrate
from vlmq_serve.calibrate.recipe import make_recipe
from vlmq_serve.format.config import QuantizationSpec
from vlmq_serve.format.scheme import Scheme
from vlmq_serve.format.shards import write_checkpoint
from vlmq_serve.format.weight import PackedWeight

IGNORE = ("visual", "vision_tower", "multi_modal_projector", "lm_head")


def round_to_nearest(weight: torch.Tensor, scheme: Scheme) -> PackedWeight:
    """The plainest quantizer there is, written out here so that these tests depend on the format only."""
    groups = scheme.num_groups(weight.shape[1])
    grouped = weight.float().reshape(weight.shape[0], groups, -1)
    if scheme.symmetric:
        scales = grouped.abs().amax(-1) / scheme.mid_code
        zeros = torch.full_like(scales, scheme.mid_code)
    else:
        low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
        scales = (high - low) / scheme.max_code
        zeros = (-low / scales).round().clamp(0, scheme.max_code)
    scales = scales.bfloat16()
    codes = (grouped / scales.float()[..., None] + zeros[..., None]).round().clamp(0, scheme.max_code)
    stored = None if scheme.symmetric else zeros
    return PackedWeight.from_codes(codes.reshape(weight.shape).int(), scales, stored, scheme)


def is_decoder_linear(name: str) -> bool:
    return ".layers." in name and name.endswith("proj.weight") and not {*IGNORE} & {*name.split(".")}


def quantize(source: Path, out: Path, scheme: str, overrides: dict[str, str] | None = None) -> Path:
    """Write `out` with every decoder linear of `source` rounded as the spec says."""
    schemes = {name: Scheme.parse(text) for name, text in (overrides or {}).items()}
    spec = QuantizationSpec(Scheme.parse(scheme), overrides=schemes, ignore=IGNORE, method="rtn")
    packed = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if is_decoder_linear(name):
            module = name.removesuffix(".weight")
            chosen = spec.scheme_for(module)
            assert chosen is not None
            packed[module] = round_to_nearest(tensor, chosen)
    write_checkpoint(source, out, packed, spec)
    return out


def quantize_parts(source: Path, out: Path, scheme: str, **settings: Any) -> Path:
    """Write `out` with `vlmq calibrate --method rtn`: head and vision tower too, where `settings` have schemes."""
    chosen = Scheme.parse(scheme)
    recipe = make_recipe(method="rtn", bits=chosen.bits, group_size=chosen.group_size, **settings)
    calibrate(source, out, None, recipe)
    return out


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"].update(changes)
    path.write_text(json.dumps(config))
