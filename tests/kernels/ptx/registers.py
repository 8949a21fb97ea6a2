"""Registers of lanes that run together: an array of one value a lane each, floats and signed numbers as their bits."""

from typing import Any

import numpy as np

from tests.kernels.ptx.program import Operand, Statement

UNWRITTEN = 0xFF
"""In every byte: NaN in every float type."""


class Registers:
    """Also which of the lanes run a statement."""

    def __init__(self, lanes: int, values: dict[str, np.ndarray]) -> None:
        self.lanes = lanes
        self.values = dict(values)
        self.active = np.ones(lanes, bool)
        self.whole = True

    def read(self, operand: Operand, kind: Any) -> np.ndarray:
        """Values of a register or literal as `kind`, a numpy type of its size."""
        kind = np.dtype(kind)
        if isinstance(operand, int):
            if kind.kind == "b":
                return np.full(self.lanes, operand != 0)
            return np.full(self.lanes, operand & (1 << 8 * kind.itemsize) - 1, f"u{kind.itemsize}").view(kind)
        if not isinstance(operand, str):
            raise TypeError(f"PTX operand: {operand}")
        value = self.values[operand]
        if value.itemsize != kind.itemsize:
            raise TypeError(f"PTX register {operand}: {value.dtype} read as {kind}")
        return value.view(kind)

    def write(self, operand: Operand, value: np.ndarray) -> None:
        """To a register, in the lanes that run."""
        if not isinstance(operand, str):
            raise TypeError(f"PTX target: {operand}")
        if value.dtype != bool:
            value = value.view(f"u{value.itemsize}")
        if not self.whole:
            byte = 0 if value.dtype == bool else UNWRITTEN
            unwritten = np.full(self.lanes * value.itemsize, byte, np.uint8).view(value.dtype)
            value = np.where(self.active, value, self.values.get(operand, unwritten))
        self.values[operand] = value

    def guard(self, statement: Statement) -> bool:
        """Decide which lanes run this statement; whether any does."""
        self.whole = True
        if statement.guard is not None:
            self.active = self.values[statement.guard] ^ statement.negated
            self.whole = bool(self.active.all())
        if self.whole:
            self.active = np.ones(self.lanes, bool)
        return bool(self.active.any())
