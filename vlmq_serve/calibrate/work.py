"""The work folder `OUT.partial`: finished layers of a run, so that an interrupted one can go on."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from vlmq_serve.calibrate.packed_layers import PackedLayers
from vlmq_serve.calibrate.plan import Plan
from vlmq_serve.calibrate.report import LayerResult, write_json
from vlmq_serve.format.errors import VLMQError
from vlmq_serve.format.headers import read_header, read_json
from vlmq_serve.format.weight import PackedWeight

_STATE = "state.json"
_WORK_FORMAT = 3
"""Goes up when the same recipe and data give other layers than before: half of each would be neither."""


def partial_folder(out: Path) -> Path:
    return out.with_name(out.name + ".partial")


class Interrupted(KeyboardInterrupt):
    """Ctrl-C in a run; `kept` is the work folder that it can go on from, if there is one."""

    def __init__(self, kept: Path | None) -> None:
        super().__init__()
        self.kept = kept


class WorkFolder:
    """Layers stored one by one, each in one step; nothing is created before the first `prepare`."""

    def __init__(self, out: Path, plan: Plan, fingerprint: Mapping[str, Any]) -> None:
        self.path = partial_folder(out)
        self._plan = plan
        # Through JSON, so that it compares equal to what is read back.
        self._fingerprint: dict[str, Any] = json.loads(json.dumps({**fingerprint, "work_format": _WORK_FORMAT}))

    def check(self, resume: bool, overwrite: bool) -> None:
        """Refuse to go on with another run's layers, and to delete them unasked."""
        if not self.path.exists():
            return
        if not resume:
            if overwrite:
                return
            raise VLMQError(f"{self.path}: holds an interrupted run; resume it, or remove the folder to start again")
        if not (self.path / _STATE).is_file():
            raise VLMQError(f"{self.path}: holds no {_STATE}, so nothing can go on from it; remove the folder")
        if changes := self._changes():
            raise VLMQError(f"resume: {'; '.join(changes)}; give the same settings, or remove {self.path}")

    def interrupted(self) -> Interrupted:
        """What to raise at Ctrl-C: before `prepare` the folder may be another run's."""
        try:
            ours = not self._changes()
        except VLMQError:
            ours = False
        return Interrupted(self.path if ours else None)

    def prepare(self, resume: bool) -> None:
        """Create the folder, or empty it where the run does not go on from it."""
        if not resume:
            shutil.rmtree(self.path, ignore_errors=True)
        self.path.mkdir(parents=True, exist_ok=True)
        write_json(self.path / _STATE, self._fingerprint)

    def finished(self) -> list[LayerResult]:
        """Results of the layers done, from the first layer without a gap."""
        results: list[LayerResult] = []
        while len(results) < self._plan.layers and (record := self.record(len(results))) is not None:
            results.append(record)
        return results

    def record(self, index: int) -> LayerResult | None:
        """Result stored under `index`: a decoder layer, or behind them the vision tower or the head.

        None where a file of it is missing or cut off, as a crash of the machine leaves it: it is done again.
        """
        files = (self._weights, self._changed, self._inputs, self._saliency)
        if not self._record(index).exists() or not all(_is_whole(path_of(index)) for path_of in files):
            return None
        return LayerResult.from_dict(read_json(self._record(index)))

    def store(
        self,
        result: LayerResult,
        packed: Mapping[str, PackedWeight],
        saliency: Mapping[int, Tensor] | None = None,
        changed: Mapping[str, Tensor] | None = None,
        inputs: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Keep a layer; its record is written last, so that a record means a whole layer.

        `changed`: dense tensors that a method has folded scales into, by source name. `inputs`: ranges of simulated
        activations.
        """
        tensors: dict[str, Tensor] = {}
        for name, weight in packed.items():
            tensors.update(weight.tensors(name))
        _save(tensors, self._weights(result.index))
        _save(changed or {}, self._changed(result.index))
        _save(inputs or {}, self._inputs(result.index))
        kept = {str(index): weights.contiguous() for index, weights in (saliency or {}).items()}
        _save(kept, self._saliency(result.index))
        write_json(self._record(result.index), result.to_dict())

    def saliency(self) -> list[dict[int, Tensor]]:
        """Token weights kept per layer: sample index to fp32 [taps, T]."""
        loaded = (load_file(self._saliency(i)) for i in range(self._plan.layers))
        return [{int(index): weights for index, weights in layer.items()} for layer in loaded]

    def changed(self, index: int) -> dict[str, Tensor]:
        """Changed dense tensors of a layer by source name."""
        path = self._changed(index)
        return load_file(path) if path.exists() else {}

    def all_changed(self) -> dict[str, Tensor]:
        """Changed dense tensors of all layers: norms and biases, which are small."""
        return {name: value for i in range(self._plan.layers) for name, value in self.changed(i).items()}

    def inputs(self, index: int) -> dict[str, Tensor]:
        """Ranges of simulated activations of a layer, by local name (`activations.range_tensors`)."""
        path = self._inputs(index)
        return load_file(path) if path.exists() else {}

    def all_inputs(self) -> dict[str, Tensor]:
        """Those of all layers, by `LAYER.NAME`."""
        layers = range(self._plan.layers)
        return {f"{i}.{name}": value for i in layers for name, value in self.inputs(i).items()}

    def packed(self) -> PackedLayers:
        return PackedLayers(self._plan, self._weights)

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)

    def _changes(self) -> list[str]:
        return _differences(read_json(self.path / _STATE), self._fingerprint)

    def _record(self, index: int) -> Path:
        return self.path / f"layer-{index:03d}.json"

    def _weights(self, index: int) -> Path:
        return self.path / f"layer-{index:03d}.safetensors"

    def _changed(self, index: int) -> Path:
        return self.path / f"layer-{index:03d}.changed.safetensors"

    def _inputs(self, index: int) -> Path:
        return self.path / f"layer-{index:03d}.inputs.safetensors"

    def _saliency(self, index: int) -> Path:
        return self.path / f"layer-{index:03d}.saliency.safetensors"


def _is_whole(path: Path) -> bool:
    try:
        read_header(path)
    except (OSError, VLMQError):
        return False
    return True


def _save(tensors: Mapping[str, Tensor], path: Path) -> None:
    staging = path.with_name(path.name + ".writing")
    save_file({name: tensor.cpu() for name, tensor in tensors.items()}, staging)
    os.replace(staging, path)


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], where: str = "") -> list[str]:
    changes = []
    for key in sorted({*old, *new}):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            changes += _differences(before, after, f"{where}{key}.")
        elif before != after:
            changes.append(f"{where}{key} was {before!r}, is now {after!r}")
    return changes
