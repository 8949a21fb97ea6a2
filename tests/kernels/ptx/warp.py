"""One warp: 32 lanes that run a program together."""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from tests.kernels.ptx import arithmetic, matrix, transfers
from tests.kernels.ptx.program import Address, NotModelledError, Operand, Program, Statement
from tests.kernels.ptx.registers import Registers

if TYPE_CHECKING:
    from tests.kernels.ptx.launch import Block

LANES = 32
LIMIT = 5_000_000
"""Statements of one warp after which a loop must be endless."""
ORDER_ONLY = ("fence",)
"""Nothing to do: stores are seen at once, and asynchronous work is done at once or as late as it may be."""


class Groups:
    """Asynchronous work in groups: done at once, or as late as it may be, when the warp waits for its group."""

    def __init__(self, late: bool) -> None:
        self.late = late
        self.open: list[Callable[[], None]] = []
        self.closed: list[list[Callable[[], None]]] = []

    def add(self, work: Callable[[], None]) -> None:
        if self.late:
            self.open.append(work)
        else:
            work()

    def commit(self) -> None:
        self.closed.append(self.open)
        self.open = []

    def wait(self, pending: int) -> None:
        """Until no more than `pending` groups are open."""
        while len(self.closed) > pending:
            for work in self.closed.pop(0):
                work()


class Warp(Registers):
    """A warp of a block, with what it has asked for and not waited for."""

    def __init__(self, program: Program, block: "Block", special: dict[str, np.ndarray]) -> None:
        super().__init__(LANES, special)
        self.program = program
        self.block = block
        self.copies = Groups(block.late)
        self.products = Groups(block.late)

    def address(self, operand: Operand) -> np.ndarray:
        """[base + offset], of all lanes."""
        if not isinstance(operand, Address):
            raise TypeError(f"PTX address: {operand}")
        base = self.values[operand.base]
        return base + base.dtype.type(operand.offset)

    def run(self) -> Iterator[None]:
        """To the end; yields wherever the warp waits for the others."""
        place = 0
        for _ in range(LIMIT):
            statement = self.program.statements[place]
            place += 1
            if not self.guard(statement):
                continue
            kind = statement.parts[0]
            if kind == "ret":
                return
            if kind == "bra":
                if not self.whole:
                    raise NotModelledError(f"lanes part ways: {statement.text}")
                place = self.program.labels[str(statement.operands[-1])]
            elif statement.parts == ("bar", "sync"):
                yield
            elif kind not in ORDER_ONLY:
                self._do(kind, statement)
        raise TimeoutError("the kernel does not end")

    def _do(self, kind: str, statement: Statement) -> None:
        for operations in (transfers.OPERATIONS, matrix.OPERATIONS):
            if kind in operations:
                return operations[kind](self, statement)
        arithmetic.do(self, statement)
