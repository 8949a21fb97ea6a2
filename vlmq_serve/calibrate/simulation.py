"""Settings that are simulated and never served: activations of few bits, and weights of 6 bits.

A checkpoint holds weights of 2, 3, 4 or 8 bits, and vLLM serves it with 16-bit activations. What is described here
exists in calibration and evaluation only, where values are rounded to the levels that integer hardware would have.
"""

import re
from dataclasses import dataclass
from typing import Any, Literal

from vlmq_serve.format.errors import VLMQError
from vlmq_serve.format.scheme import Scheme

ActivationRange = Literal["token", "channel", "tensor"]
ACTIVATION_BITS = (4, 6, 8)
_PATTERN = re.compile(r"(?P<weights>w(?P<bits>\d+)g(?P<group>-?\d+)(?P<symmetric>s?))(a(?P<activations>\d+))?")
_NARROW_BITS, _NARROW_WORD = 6, 8


@dataclass(frozen=True)
class ActivationScheme:
    """Inputs of quantized linears at `bits`, asymmetric. `range`: the smallest and largest value of each token as it
    comes (dynamic), or of each channel or of the whole tensor over the calibration tokens (static)."""

    bits: int
    range: ActivationRange = "token"

    def __post_init__(self) -> None:
        if self.bits not in ACTIVATION_BITS:
            raise VLMQError(f"activation_bits: got {self.bits!r}, allowed {ACTIVATION_BITS}")

    @property
    def is_static(self) -> bool:
        return self.range != "token"


@dataclass(frozen=True)
class NarrowScheme(Scheme):
    """Six-bit levels in words of 8 bits: codes and zero points of a 6-bit grid, stored exactly in the 8-bit form."""

    @property
    def max_code(self) -> int:
        return 2**_NARROW_BITS - 1

    def __str__(self) -> str:
        return f"w{_NARROW_BITS}g{self.group_size}"


def weight_scheme(bits: int, group_size: int, symmetric: bool) -> Scheme:
    """The scheme of a recipe; 6 bits are simulated in 8-bit words."""
    if bits != _NARROW_BITS:
        return Scheme(bits, group_size, symmetric)
    if symmetric:
        raise VLMQError("symmetric: got true with 6 bits, which live in 8-bit words with zero points; use false")
    return NarrowScheme(_NARROW_WORD, group_size)


def parse_setting(text: str) -> dict[str, Any]:
    """`w4g64`, `w2g-1s` or, with simulated activations, `w4g64a8` as keys of a recipe."""
    match = _PATTERN.fullmatch(text)
    if match is None:
        raise VLMQError(f"scheme: got {text!r}, expected a form such as 'w4g128', 'w3g64s', 'w2g-1' or 'w4g64a8'")
    keys: dict[str, Any] = {
        "bits": int(match["bits"]), "group_size": int(match["group"]), "symmetric": match["symmetric"] == "s"
    }  # fmt: skip
    return keys if match["activations"] is None else {**keys, "activation_bits": int(match["activations"])}
