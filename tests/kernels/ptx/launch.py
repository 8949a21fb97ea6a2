"""Runs a grid of PTX programs, one block after the other in any order, the warps of a block in any order.

A warp runs until a barrier before another has its turn, so what only a barrier would order happens in an order of
chance. Lanes of a warp run together.
"""

from dataclasses import dataclass, field

import numpy as np

from tests.kernels.ptx.memory import Global, Shared
from tests.kernels.ptx.program import Program
from tests.kernels.ptx.warp import LANES, Warp

SHARED_START = 1024
"""Address of the first byte that a program may use; tiles for matrix instructions count on multiples of 1024."""
AXES = "xyz"


@dataclass
class Block:
    """What the warps of a block share. `late`: asynchronous work is done as late as it may be, else at once."""

    memory: Global
    shared: Shared
    parameters: dict[str, int]
    late: bool


@dataclass
class Launch:
    """A compiled kernel: its program, warps, and bytes of shared memory."""

    program: Program
    warps: int
    shared_bytes: int
    memory: Global = field(default_factory=Global)

    def run(self, grid: tuple[int, int, int], arguments: list[int], seed: int, late: bool) -> Shared:
        """Arguments in the order of the parameters; those that are missing are 0. The shared memory of the last block
        is returned, for what it counted."""
        random = np.random.default_rng(seed)
        padded = arguments + [0] * (len(self.program.parameters) - len(arguments))
        parameters = dict(zip(self.program.parameters, padded, strict=True))
        for place in random.permutation(int(np.prod(grid))):
            block = Block(self.memory, Shared(SHARED_START + self.shared_bytes), parameters, late)
            self._run_block(block, [int(i) for i in np.unravel_index(place, grid)], grid, random)
        return block.shared

    def _run_block(self, block: Block, index: list[int], grid: tuple[int, ...], random: np.random.Generator) -> None:
        special = {f"%ctaid.{a}": np.full(LANES, i, np.uint32) for a, i in zip(AXES, index, strict=True)}
        special |= {f"%nctaid.{a}": np.full(LANES, n, np.uint32) for a, n in zip(AXES, grid, strict=True)}
        special["global_smem"] = np.full(LANES, SHARED_START, np.uint32)
        lanes = np.arange(LANES, dtype=np.uint32)
        running = [
            Warp(self.program, block, special | {"%tid.x": lanes + np.uint32(LANES * w)}).run()
            for w in range(self.warps)
        ]
        while running:
            # To the next barrier, or to the end.
            random.shuffle(running)
            running = [warp for warp in running if next(warp, StopIteration) is None]
