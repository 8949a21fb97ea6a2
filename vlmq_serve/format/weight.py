"""One quantized linear weight in checkpoint layout."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vlmq_serve.format.errors import VLMQError
from vlmq_serve.format.packing import pack_codes, unpack_codes
from vlmq_serve.format.scheme import WORD_BITS, Scheme, tensor_shapes

_NUMBERS_AT_ONCE = 2**24
"""That are dequantized together: the steps between take six times the memory of a whole table of embeddings in bf16."""


@dataclass(frozen=True)
class PackedWeight:
    """`w = (q - zero) * scale`, q packed along K.

    qweight: int32 [N, K*bits/32]; scales: float [N, K/G]; zeros: uint8 [N, K/G], None when symmetric.
    """

    qweight: Tensor
    scales: Tensor
    zeros: Tensor | None
    scheme: Scheme

    def __post_init__(self) -> None:
        if self.qweight.dtype != torch.int32 or not self.scales.is_floating_point():
            raise VLMQError(
                f"packed weight: got {self.qweight.dtype} and {self.scales.dtype}, expected int32 and float"
            )
        if (self.zeros is None) != self.scheme.symmetric:
            raise VLMQError(f"zeros: got {'none' if self.zeros is None else 'some'} for the scheme {self.scheme}")
        if self.zeros is not None and self.zeros.dtype != torch.uint8:
            raise VLMQError(f"zeros: got {self.zeros.dtype}, expected uint8")
        for suffix, expected in tensor_shapes(self.scheme, *self.shape).items():
            got = tuple(getattr(self, suffix).shape)
            if got != expected:
                raise VLMQError(f"{suffix}: got shape {got}, expected {expected} for {self.scheme} of {self.shape}")

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K) of the weight that this stands for."""
        return self.qweight.shape[0], self.qweight.shape[1] * WORD_BITS // self.scheme.bits

    @classmethod
    def from_codes(cls, codes: Tensor, scales: Tensor, zeros: Tensor | None, scheme: Scheme) -> "PackedWeight":
        """Pack codes [N, K] with scales [N, K/G] and integer zeros [N, K/G]."""
        packed = pack_codes(codes, scheme.bits)
        return cls(packed, scales.contiguous(), None if zeros is None else zeros.to(torch.uint8).contiguous(), scheme)

    def codes(self) -> Tensor:
        """uint8 [N, K]."""
        return unpack_codes(self.qweight, self.scheme.bits)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[N, K], computed in fp32 and then rounded once to `dtype`."""
        weight = torch.empty(self.shape, dtype=dtype, device=self.qweight.device)
        step = max(_NUMBERS_AT_ONCE // self.shape[1], 1)
        for start in range(0, self.shape[0], step):
            rows = slice(start, start + step)
            codes = unpack_codes(self.qweight[rows], self.scheme.bits)
            scales = self.scales[rows, :, None].to(torch.float32)
            zeros = self.scheme.mid_code if self.zeros is None else self.zeros[rows, :, None].to(torch.float32)
            grouped = codes.to(torch.float32).reshape(*scales.shape[:2], -1)
            weight[rows] = ((grouped - zeros) * scales).flatten(1)
        return weight

    def to(self, device: torch.device | str) -> "PackedWeight":
        """The same weight on `device`."""
        zeros = None if self.zeros is None else self.zeros.to(device)
        return replace(self, qweight=self.qweight.to(device), scales=self.scales.to(device), zeros=zeros)

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Checkpoint tensors of the linear called `name`."""
        parts = {"qweight": self.qweight, "scales": self.scales, "zeros": self.zeros}
        return {f"{name}.{suffix}": tensor for suffix, tensor in parts.items() if tensor is not None}

    @property
    def nbytes(self) -> int:
        """Bytes on disk and in memory in this layout."""
        return sum(t.numel() * t.element_size() for t in self.tensors("").values())
