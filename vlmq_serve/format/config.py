"""`QuantizationSpec` and its form in config.json."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from vlmq_serve.format.errors import VLMQError
from vlmq_serve.format.names import EMBEDDINGS, fused_groups, is_under, part_of_model
from vlmq_serve.format.scheme import Scheme

QUANT_METHOD = "vlmq"
FORMAT_VERSION = 1
_SCHEME_KEYS = {"bits", "group_size", "symmetric"}
_KEYS = _SCHEME_KEYS | {
    "quant_method", "format_version", "overrides", "ignore", "producer", "method", "settings", "hashes",
}  # fmt: skip


@dataclass(frozen=True)
class QuantizationSpec:
    """What is quantized and how: a default scheme, overrides by Hugging Face module name, and what is left alone."""

    scheme: Scheme
    overrides: Mapping[str, Scheme] = field(default_factory=dict)
    ignore: tuple[str, ...] = ()
    method: str = "unknown"
    settings: Mapping[str, Any] = field(default_factory=dict)
    producer: str = "unknown"
    hashes: Mapping[str, str] = field(default_factory=dict)

    @property
    def simulated_activations(self) -> int | None:
        """Bits of activations that calibration has simulated; what is stored and served are the weights alone."""
        bits = self.settings.get("activation_bits")
        return bits if isinstance(bits, int) else None

    def scheme_for(self, name: str) -> Scheme | None:
        """Scheme of the linear `name`, or None where it is left unquantized.

        An ignore entry or an override holds for the module of that name and all modules below it; names may leave
        leading parents out. The longest override that fits wins. Embeddings are no linear: they have a scheme only
        where an override names them.
        """
        if any(is_under(name, entry) for entry in self.ignore):
            return None
        fitting = [entry for entry in self.overrides if is_under(name, entry)]
        if part_of_model(name) == EMBEDDINGS:
            fitting = [entry for entry in fitting if part_of_model(entry) == EMBEDDINGS]
            return self.overrides[max(fitting, key=len)] if fitting else None
        return self.overrides[max(fitting, key=len)] if fitting else self.scheme

    def check_fused(self, names: Iterable[str]) -> None:
        """Raise `VLMQError` where linears that vLLM fuses into one layer have different schemes."""
        for fused, members in fused_groups(names).items():
            schemes = {member: self.scheme_for(member) for member in members}
            if len(set(schemes.values())) > 1:
                got = ", ".join(f"{m.rpartition('.')[2]}={s or 'unquantized'}" for m, s in schemes.items())
                raise VLMQError(f"{fused}: got {got}; vLLM fuses these into one layer, give all of them one scheme")

    def to_dict(self) -> dict[str, Any]:
        """The `quantization_config` entry of config.json."""
        return {
            "quant_method": QUANT_METHOD,
            "format_version": FORMAT_VERSION,
            **_scheme_dict(self.scheme),
            "overrides": {name: _scheme_dict(scheme) for name, scheme in self.overrides.items()},
            "ignore": list(self.ignore),
            # An object, because vLLM reads `producer.name` of every quantization_config.
            "producer": {"name": self.producer},
            "method": self.method,
            "settings": dict(self.settings),
            "hashes": dict(self.hashes),
        }

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> "QuantizationSpec":
        """Read and check a `quantization_config`; every fault is one `VLMQError`."""
        if raw.get("quant_method") != QUANT_METHOD:
            raise VLMQError(f"quant_method: got {raw.get('quant_method')!r}, expected {QUANT_METHOD!r}")
        version = raw.get("format_version")
        if version != FORMAT_VERSION:
            raise VLMQError(
                f"format_version: got {version!r}, this vlmq-serve reads {FORMAT_VERSION}; "
                "install the vlmq-serve that wrote the checkpoint, or calibrate again"
            )
        unknown = set(raw) - _KEYS
        if unknown:
            raise VLMQError(f"quantization_config: got unknown keys {sorted(unknown)}, allowed {sorted(_KEYS)}")
        overrides, ignore = raw.get("overrides", {}), raw.get("ignore", [])
        if not isinstance(overrides, Mapping) or not isinstance(ignore, (list, tuple)):
            raise VLMQError("quantization_config: overrides must be an object and ignore a list of module names")
        return cls(
            scheme=_read_scheme(raw, "quantization_config"),
            overrides={name: _read_scheme(entry, f"overrides[{name!r}]") for name, entry in overrides.items()},
            ignore=tuple(ignore),
            method=str(raw.get("method", "unknown")),
            settings=dict(raw.get("settings", {})),
            producer=_read_producer(raw.get("producer", {})),
            hashes=dict(raw.get("hashes", {})),
        )


def _read_producer(raw: Any) -> str:
    if not isinstance(raw, Mapping):
        raise VLMQError(f"producer: got {raw!r}, expected an object with a name; vLLM reads producer.name")
    return str(raw.get("name", "unknown"))


def _scheme_dict(scheme: Scheme) -> dict[str, Any]:
    return {"bits": scheme.bits, "group_size": scheme.group_size, "symmetric": scheme.symmetric}


def _read_scheme(raw: Any, where: str) -> Scheme:
    if not isinstance(raw, Mapping):
        raise VLMQError(f"{where}: got {raw!r}, expected an object with {sorted(_SCHEME_KEYS)}")
    missing = _SCHEME_KEYS - set(raw)
    if missing:
        raise VLMQError(f"{where}: {sorted(missing)} missing; the checkpoint's config.json is incomplete")
    bits, group_size, symmetric = raw["bits"], raw["group_size"], raw["symmetric"]
    if type(bits) is not int or type(group_size) is not int or type(symmetric) is not bool:
        raise VLMQError(f"{where}: got bits={bits!r}, group_size={group_size!r}, symmetric={symmetric!r}")
    return Scheme(bits, group_size, symmetric)
