"""What every solver takes and gives back."""

from dataclasses import dataclass

import torch
from torch import Tensor

from vlmq_serve.calibrate.solvers.grid import Grid, GridSearch
from vlmq_serve.format.scheme import Scheme
from vlmq_serve.format.weight import PackedWeight


@dataclass(frozen=True)
class SolverOptions:
    """Settings shared by the solvers; each field is described in `recipe.Recipe`."""

    scale_dtype: torch.dtype
    grid: GridSearch = "minmax"
    percdamp: float = 0.01
    act_order: bool = True
    alpha: float = 0.25
    block_size: int = 128
    percentile: float = 1.0


@dataclass(frozen=True)
class Solution:
    """Integer codes [N, K] with their grid ([N, K/G]) and the damping that the factorisation needed (0: none)."""

    codes: Tensor
    grid: Grid
    scheme: Scheme
    damping: float = 0.0

    def dequantize(self) -> Tensor:
        """The weight [N, K] that the codes stand for, in the codes' dtype."""
        groups = self.codes.reshape(*self.grid.zeros.shape, -1)
        scales = self.grid.scales.to(groups)[..., None]
        return ((groups - self.grid.zeros[..., None]) * scales).reshape(self.codes.shape)

    def pack(self) -> PackedWeight:
        """The checkpoint form, on the device of the codes."""
        zeros = None if self.scheme.symmetric else self.grid.zeros
        return PackedWeight.from_codes(self.codes.to(torch.uint8), self.grid.scales, zeros, self.scheme)
