"""One quantized linear weight in checkpoint layout."""

from dataclasses import dataclass

import torch
from torch import Tensor

from vlmq_serve.format.errors import VLMQError
from vlmq_serve.format.packing import pack_codes, unpack_codes
from vlmq_serve.format.scheme import WORD_BITS, Scheme, tensor_shapes


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
        rows, cols = self.shape
        grouped = self.codes().to(torch.float32).reshape(rows, self.scales.shape[1], -1)
        zeros = self.scheme.mid_code if self.zeros is None else self.zeros.to(torch.float32)[:, :, None]
        return ((grouped - zeros) * self.scales.to(torch.float32)[:, :, None]).reshape(rows, cols).to(dtype)

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Checkpoint tensors of the linear called `name`."""
        parts = {"qweight": self.qweight, "scales": self.scales, "zeros": self.zeros}
        return {f"{name}.{suffix}": tensor for suffix, tensor in parts.items() if tensor is not None}

    @property
    def nbytes(self) -> int:
        """Bytes on disk and in memory in this layout."""
        return sum(t.numel() * t.element_size() for t in self.tensors("").values())
