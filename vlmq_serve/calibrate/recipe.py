"""What a calibration is told, checked, and what follows from it."""

from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import ValidationError, model_validator

from vlmq_serve.calibrate.settings import SchemeOverride, Settings
from vlmq_serve.calibrate.simulation import ActivationScheme, weight_scheme
from vlmq_serve.format.errors import VLMQError
from vlmq_serve.format.scheme import Scheme

Solver = Literal["rtn", "gptq", "gptaq"]
Part = Literal["lm_head", "vision", "embeddings"]
PARTS: tuple[Part, ...] = get_args(Part)

_BASES = {
    "vlmq": ("auto", "gptq", "gptaq"),
    # No gptaq: its residual compares inputs, and folded scales change those of the quantized path.
    "awq": ("auto", "rtn", "gptq"),
    "mbq": ("auto", "rtn", "gptq"),
    "tlq": ("auto", "rtn", "gptq"),
}


class Recipe(Settings):
    """The settings of one calibration and what they lead to."""

    @property
    def scheme(self) -> Scheme:
        """The default scheme."""
        return weight_scheme(self.bits, self.group_size, self.symmetric)

    @property
    def activations(self) -> ActivationScheme | None:
        """How activations are simulated; None: they stay at 16 bits."""
        return None if self.activation_bits is None else ActivationScheme(self.activation_bits, self.activation_range)

    @property
    def override_schemes(self) -> dict[str, Scheme]:
        """Complete schemes of the overrides."""
        return {
            name: weight_scheme(
                self.bits if entry.bits is None else entry.bits,
                self.group_size if entry.group_size is None else entry.group_size,
                self.symmetric if entry.symmetric is None else entry.symmetric,
            )
            for name, entry in self.overrides.items()
        }

    def part_scheme(self, part: Part) -> Scheme | None:
        """Scheme of what is quantized beside the decoder's linears; None where it is left as it is."""
        text: str | None = getattr(self, part)
        if text is None:
            return None
        try:
            return Scheme.parse(text if "g" in text else f"{text}g{self.group_size}")
        except VLMQError as error:
            raise VLMQError(f"{part}: {error}") from None

    @model_validator(mode="after")
    def _check_base(self) -> "Recipe":
        allowed = _BASES.get(self.method, ("auto",))
        if self.base not in allowed:
            raise ValueError(f"base: got {self.base!r}, method {self.method} allows {', '.join(allowed)}")
        if 6 in (self.bits, *(entry.bits for entry in self.overrides.values())) and self.activation_bits is None:
            raise ValueError("bits: got 6, which exists for simulated activations only; use 4 or 8")
        if self.simulated_vision and (self.method != "qvlm" or self.activation_bits is None):
            raise ValueError("simulated_vision: needs method qvlm and activation_bits")
        if self.simulated_vision and self.vision is not None:
            raise ValueError("simulated_vision: got a scheme for `vision` as well; the tower is simulated or stored")
        return self

    @property
    def needs_data(self) -> bool:
        static = self.activation_bits is not None and self.activation_range != "token"
        return self.method != "rtn" or self.grid in ("diagonal", "output") or static

    def solver(self, bits: int) -> Solver:
        """What rounds a linear of this width."""
        if self.method in ("rtn", "gptq", "gptaq"):
            return self.method
        if self.base != "auto":
            return self.base
        if self.method == "vlmq":
            return "gptaq" if bits > 2 else "gptq"
        return "rtn"

    @property
    def equalizes(self) -> bool:
        """Whether channel scales are searched and folded before rounding."""
        return self.method in ("awq", "mbq", "tlq")

    @property
    def searches_exposed(self) -> bool:
        """Whether channel scales are judged on the quantized path's inputs."""
        return self.method == "tlq" if self.exposed is None else self.exposed

    def needs_statistics(self, bits: int) -> bool:
        """Whether rounding a linear of this width needs the Hessian of its inputs."""
        return self.solver(bits) != "rtn" or self.grid in ("diagonal", "output")

    @property
    def needs_answer_gradients(self) -> bool:
        """Whether the cross-entropy runs through the whole model before the layers are quantized."""
        return self.method in ("mbq", "tlq") or (self.method == "vlmq" and self.importance == "cross_entropy")

    def uses_residual(self, bits: int) -> bool:
        """Whether a linear of this width is solved with the asymmetric residual term."""
        return self.solver(bits) == "gptaq"


def make_recipe(**settings: Any) -> Recipe:
    """Build a `Recipe`, schemes checked; every fault is one `VLMQError`."""
    try:
        recipe = Recipe(**settings)
    except ValidationError as error:
        raise VLMQError(f"recipe: {_first_fault(error)}") from None
    return _checked(recipe)


def load_recipe(path: Path, **settings: Any) -> Recipe:
    """Read a YAML recipe; `settings` (from the command line) win over the file."""
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise VLMQError(f"recipe {path}: cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise VLMQError(f"recipe {path}: not valid YAML ({' '.join(str(error).split())})") from None
    if raw is None:
        raw = {}
    if not isinstance(raw, dict):
        raise VLMQError(f"recipe {path}: got a {type(raw).__name__}, expected `key: value` lines")
    try:
        return make_recipe(**{**{str(key): value for key, value in raw.items()}, **settings})
    except VLMQError as error:
        raise VLMQError(f"{path}: {error}") from None


def _checked(recipe: Recipe) -> Recipe:
    parts = [recipe.part_scheme(part) for part in PARTS]
    _ = recipe.scheme, recipe.override_schemes, recipe.activations, parts
    return recipe


def _first_fault(error: ValidationError) -> str:
    fault = error.errors()[0]
    where = ".".join(str(part) for part in fault["loc"])
    if not where:  # a check of several settings, which names them itself
        return str(fault["ctx"]["error"])
    if fault["type"] == "extra_forbidden":
        model = SchemeOverride if fault["loc"][0] == "overrides" else Recipe
        return f"unknown key {where!r}; allowed: {', '.join(sorted(model.model_fields))}"
    return f"{where}: got {fault.get('input')!r}; {fault['msg']}"
