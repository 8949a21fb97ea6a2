"""What is compared: a method with its settings, a scheme and a calibration seed."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from vlmq_serve.calibrate.recipe import Recipe, make_recipe
from vlmq_serve.calibrate.simulation import parse_setting
from vlmq_serve.format.errors import VLMQError

UNQUANTIZED = "bf16"
_COMMA = re.compile(r",(?![^\[]*\])")  # not within a list: weighted=[q_proj,k_proj]


@dataclass(frozen=True)
class Variant:
    """One checkpoint to make and to question. `label` is the method with its settings; no recipe: the source model."""

    label: str
    scheme: str = ""
    seed: int = 0
    recipe: Recipe | None = None

    @property
    def name(self) -> str:
        """Unique and fit for a file name."""
        plain = re.sub(r"[^\w.=-]+", "_", self.label)
        return plain if self.recipe is None else f"{plain}-{self.scheme}-seed{self.seed}"


@dataclass(frozen=True)
class Selection:
    """Methods as `METHOD[:key=value,...]`, schemes such as `w3g64`, calibration seeds, settings that all share."""

    methods: Sequence[str]
    schemes: Sequence[str]
    seeds: Sequence[int]
    shared: Mapping[str, Any] = field(default_factory=dict)

    def variants(self) -> list[Variant]:
        """The source model first, then every combination; a method without data runs once, with the first seed."""
        return [Variant(UNQUANTIZED), *self._quantized()]

    def _quantized(self) -> Iterator[Variant]:
        for scheme in self.schemes:
            width = parse_setting(scheme)
            for label in dict.fromkeys(self.methods):
                method, settings = parse_method(label)
                for seed in dict.fromkeys(self.seeds):
                    recipe = make_recipe(**{**width, **self.shared, "method": method, "seed": seed, **settings})
                    yield Variant(label, scheme, seed, recipe)
                    if not recipe.needs_data:
                        break


def parse_method(label: str) -> tuple[str, dict[str, Any]]:
    """`vlmq:exponent=2,samples=64` as method and settings, values read as YAML."""
    method, colon, rest = label.partition(":")
    settings: dict[str, Any] = {}
    for part in _COMMA.split(rest) if colon else ():
        key, equals, value = part.partition("=")
        if not equals or not key.strip():
            raise VLMQError(f"method {label!r}: got {part!r}, expected METHOD:key=value,key=value, as vlmq:exponent=2")
        settings[key.strip()] = yaml.safe_load(value)
    return method, settings
