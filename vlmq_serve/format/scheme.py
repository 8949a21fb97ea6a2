"""How one linear layer is quantized: bits, group size, symmetry."""

import re
from dataclasses import dataclass, replace

from vlmq_serve.format.errors import VLMQError

ALLOWED_BITS = (2, 3, 4, 8)
ALLOWED_GROUP_SIZES = (32, 64, 128, -1)
WORD_BITS = 32
SUFFIXES = ("qweight", "scales", "zeros")
"""Names of the checkpoint tensors of one linear, behind the linear's own name."""
CODES_PER_BLOCK = 32
"""Codes along K come in blocks of 32, which fill `bits` int32 words exactly at every width."""

_PATTERN = re.compile(r"w(?P<bits>\d+)g(?P<group>-?\d+)(?P<symmetric>s?)")


@dataclass(frozen=True)
class Scheme:
    """Uniform integer quantization, `w = (q - zero) * scale` per group of `group_size` weights along K.

    `group_size` -1 means one group per output row. Symmetric weights have the fixed zero `mid_code`.
    The string form is `w3g128`, with a trailing `s` when symmetric.
    """

    bits: int
    group_size: int = 128
    symmetric: bool = False

    def __post_init__(self) -> None:
        if self.bits not in ALLOWED_BITS:
            raise VLMQError(f"bits: got {self.bits!r}, allowed {ALLOWED_BITS}")
        if self.group_size not in ALLOWED_GROUP_SIZES:
            raise VLMQError(f"group_size: got {self.group_size!r}, allowed {ALLOWED_GROUP_SIZES} (-1: whole row)")

    def __str__(self) -> str:
        return f"w{self.bits}g{self.group_size}{'s' if self.symmetric else ''}"

    @classmethod
    def parse(cls, text: str) -> "Scheme":
        """Read the string form, for example `w4g128` or `w4g64s`."""
        match = _PATTERN.fullmatch(text)
        if match is None:
            raise VLMQError(f"scheme: got {text!r}, expected a form such as 'w4g128', 'w3g64s' or 'w2g-1'")
        return cls(int(match["bits"]), int(match["group"]), match["symmetric"] == "s")

    @property
    def max_code(self) -> int:
        """Largest code, 2^bits - 1."""
        return 2**self.bits - 1

    @property
    def mid_code(self) -> int:
        """Zero point of symmetric weights, 2^(bits-1)."""
        return 2 ** (self.bits - 1)

    def group_length(self, in_features: int) -> int:
        """Weights that share one scale, with -1 resolved to the row length."""
        return in_features if self.group_size == -1 else self.group_size

    def num_groups(self, in_features: int) -> int:
        """Groups along K; raises `VLMQError` where K does not divide by 32 and by the group size."""
        if in_features <= 0 or in_features % CODES_PER_BLOCK:
            raise VLMQError(
                f"in_features: got K={in_features}, {self} needs a multiple of {CODES_PER_BLOCK}; "
                "leave this layer unquantized (ignore list)"
            )
        group = self.group_length(in_features)
        if in_features % group:
            fits = [g for g in ALLOWED_GROUP_SIZES if g > 0 and in_features % g == 0]
            raise VLMQError(
                f"group_size: got {group} for K={in_features}, which it does not divide; "
                f"use one of {[*fits, -1]} for this layer"
            )
        return in_features // group

    def fitted(self, in_features: int) -> "Scheme | None":
        """This scheme with the largest group, not above its own, that divides K; None where 32 does not divide K."""
        if in_features % CODES_PER_BLOCK:
            return None
        groups = [g for g in ALLOWED_GROUP_SIZES if 0 < g <= self.group_size and in_features % g == 0]
        return replace(self, group_size=max(groups)) if groups else self

    def packed_words(self, in_features: int) -> int:
        """int32 words of one packed row."""
        return in_features * self.bits // WORD_BITS


def tensor_shapes(scheme: Scheme, out_features: int, in_features: int) -> dict[str, tuple[int, int]]:
    """Shapes of the checkpoint tensors of a [N, K] weight, by suffix; no `zeros` when symmetric."""
    groups = scheme.num_groups(in_features)
    shapes = {
        "qweight": (out_features, scheme.packed_words(in_features)),
        "scales": (out_features, groups),
    }
    if not scheme.symmetric:
        shapes["zeros"] = (out_features, groups)
    return shapes
