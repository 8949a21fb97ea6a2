"""A damaged checkpoint ends the start of vLLM with one error that says what, got, allowed and what to do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from tests.quant_methods.checkpoints import edit_config, quantize

pytestmark = pytest.mark.serve
LINEAR = "model.layers.1.self_attn.k_proj"


@pytest.fixture(scope="module")
def checkpoint(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantize(tiny_model, tmp_path_factory.mktemp("quantized") / "w4", "w4g64")


def remove_tensor(folder: Path, name: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors[name]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def forget_names(folder: Path) -> None:
    """As if the checkpoint did not say how many tensors were written."""
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["hashes"] = {}
    (folder / "config.json").write_text(json.dumps(config))


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


CASES = [
    pytest.param(lambda f: remove_tensor(f, f"{LINEAR}.scales"), "was removed or renamed", id="scales-removed"),
    pytest.param(
        lambda f: (remove_tensor(f, f"{LINEAR}.zeros"), forget_names(f)), rf"{LINEAR}.zeros: missing", id="zeros"
    ),
    pytest.param(truncate, "the file is truncated", id="truncated"),
    pytest.param(lambda f: edit_config(f, bits=3), r"w3g64", id="wrong-bits"),
    pytest.param(lambda f: edit_config(f, bits=5), r"bits: got 5, allowed", id="impossible-bits"),
    pytest.param(lambda f: edit_config(f, group_size=32), r"expected \(.*w4g32", id="wrong-group-size"),
    pytest.param(lambda f: edit_config(f, format_version=2), r"format_version: got 2", id="format-version"),
]


@pytest.mark.parametrize(("damage", "message"), CASES)
def test_damage_is_one_clear_error(
    checkpoint: Path, damaged: Callable, engine: Callable[..., Any], damage: Callable, message: str
) -> None:
    folder = damaged(checkpoint)
    damage(folder)
    with pytest.raises(ValueError, match=message):
        engine(folder)


@pytest.mark.parametrize("suffix", ["qweight", "scales", "zeros"])
def test_a_missing_tensor_is_found_without_the_headers_check(
    checkpoint: Path, damaged: Callable, engine: Callable[..., Any], suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that vLLM downloads is not there when the headers are checked: loading itself must notice."""
    from vlmq_serve.quant_methods.config import VLMQConfig

    folder = damaged(checkpoint)
    remove_tensor(folder, f"{LINEAR}.{suffix}")
    monkeypatch.setattr(VLMQConfig, "maybe_update_config", lambda *_, **__: None)
    with pytest.raises(ValueError, match=rf"layers\.1\.self_attn\.k_proj\.{suffix}: was not loaded"):
        engine(folder)
