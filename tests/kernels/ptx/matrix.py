"""Matrix instructions of PTX: fragments in registers, and tiles of shared memory.

Lane l = 4 g + t holds, of a fragment of 8 rows and 8 columns of 16 bits, row g and columns 2 t and 2 t + 1 in one
register. An A of 16 x 16 is four of them, rows 0 and 8 first; B of 16 x 8 is two; sums are fp32, in the same places.
"""

from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from tests.kernels.ptx import floats
from tests.kernels.ptx.program import NotModelledError, Operand, Statement

if TYPE_CHECKING:
    from tests.kernels.ptx.warp import Warp

LANE = np.arange(32)
ROW, COLUMN = LANE // 4, 2 * (LANE % 4)
SWIZZLES = {1: (128, 7), 2: (64, 3), 3: (32, 1)}
"""By the code in a descriptor: bytes in a row, and which of the address bits 7 to 9 are added to bits 4 to 6."""


def _registers(operand: Operand) -> tuple[Operand, ...]:
    if not isinstance(operand, tuple):
        raise TypeError(f"PTX vector: {operand}")
    return operand


def _left(warp: "Warp", registers: tuple[Operand, ...], bf16: bool) -> np.ndarray:
    """A fp64 [16, 16]."""
    a = np.empty((16, 16))
    for i, name in enumerate(registers):
        pair = floats.from_half(warp.read(name, np.uint32).view(np.uint16), bf16).reshape(32, 2)
        for j in (0, 1):
            a[ROW + 8 * (i % 2), COLUMN + 8 * (i // 2) + j] = pair[:, j]
    return a


def _sums(warp: "Warp", registers: tuple[Operand, ...]) -> np.ndarray:
    """fp64 [16, 8 n] from 4 n registers."""
    c = np.empty((16, 2 * len(registers)))
    for i, name in enumerate(registers):
        c[ROW + 8 * (i // 2 % 2), 8 * (i // 4) + COLUMN + i % 2] = warp.read(name, np.float32)
    return c


def _write_sums(warp: "Warp", registers: tuple[Operand, ...], sums: np.ndarray) -> None:
    for i, name in enumerate(registers):
        value = sums[ROW + 8 * (i // 2 % 2), 8 * (i // 4) + COLUMN + i % 2]
        with np.errstate(over="ignore"):
            warp.write(name, value.astype(np.float32))


def multiply(warp: "Warp", s: Statement) -> None:
    """mma.sync m16n8k16."""
    if "m16n8k16" not in s.parts:
        raise NotModelledError(s.text)
    target, a, b, c = (_registers(o) for o in s.operands)
    bf16 = s.parts[-2] == "bf16"
    right = np.empty((16, 8))
    for i, name in enumerate(b):
        pair = floats.from_half(warp.read(name, np.uint32).view(np.uint16), bf16).reshape(32, 2)
        for j in (0, 1):
            right[COLUMN + 8 * i + j, ROW] = pair[:, j]
    _write_sums(warp, target, _left(warp, a, bf16) @ right + _sums(warp, c))


def multiply_group(warp: "Warp", s: Statement) -> None:
    """wgmma: four warps, each with 16 rows of A in its registers, times a tile of shared memory, asynchronously."""
    action = s.parts[1]
    if action == "fence":
        return
    if action == "commit_group":
        return warp.products.commit()
    if action == "wait_group":
        assert isinstance(s.operands[0], int)
        return warp.products.wait(s.operands[0])
    target, a, descriptor, add, *rest = s.operands
    if not isinstance(a, tuple) or rest != [1, 1, 0]:
        raise NotModelledError(s.text)
    where = int(warp.read(descriptor, np.uint64)[0])
    keep = bool(warp.read(add, bool)[0])
    warp.products.add(partial(_multiply_group, warp, _registers(target), a, where, keep, s.parts[-1] == "bf16"))


def _multiply_group(
    warp: "Warp", target: tuple[Operand, ...], a: tuple[Operand, ...], descriptor: int, keep: bool, bf16: bool
) -> None:
    warp.whole, whole = True, warp.whole
    right = _tile(warp, descriptor, 2 * len(target), bf16)
    _write_sums(warp, target, _left(warp, a, bf16) @ right + (_sums(warp, target) if keep else 0.0))
    warp.whole = whole


def _tile(warp: "Warp", descriptor: int, columns: int, bf16: bool) -> np.ndarray:
    """B fp64 [16, columns] whose columns are rows of shared memory, 8 of them together."""
    start, stride = (descriptor & 0x3FFF) << 4, (descriptor >> 32 & 0x3FFF) << 4
    if descriptor >> 49 & 7 or descriptor >> 62 not in SWIZZLES:
        raise NotModelledError(f"matrix descriptor {descriptor:#x}")
    width, mask = SWIZZLES[descriptor >> 62]
    k, n = np.arange(16)[:, None], np.arange(columns)[None, :]
    at = start + n // 8 * stride + n % 8 * width + 2 * k
    at ^= (at >> 7 & mask) << 4
    return floats.from_half(warp.block.shared.data.view(np.uint16)[at // 2], bf16)


def load_matrix(warp: "Warp", s: Statement) -> None:
    """ldmatrix x4: lane 8 i + r gives the address of row r of matrix i."""
    targets, source = _registers(s.operands[0]), s.operands[1]
    rows = warp.block.shared.load(warp.address(source)[: 8 * len(targets)], 16, "matrix").view(np.uint16)
    for i, name in enumerate(targets):
        matrix = rows[8 * i : 8 * i + 8]
        matrix = matrix.T if "trans" in s.parts else matrix
        pair = np.stack([matrix[ROW, COLUMN], matrix[ROW, COLUMN + 1]], 1)
        warp.write(name, np.ascontiguousarray(pair).view(np.uint32)[:, 0])


def store_matrix(warp: "Warp", s: Statement) -> None:
    """stmatrix x4, the reverse."""
    target, sources = s.operands[0], _registers(s.operands[1])
    rows = np.empty((8 * len(sources), 8), np.uint16)
    for i, name in enumerate(sources):
        pair = np.ascontiguousarray(warp.read(name, np.uint32))[:, None].view(np.uint16)
        matrix = np.empty((8, 8), np.uint16)
        matrix[ROW, COLUMN], matrix[ROW, COLUMN + 1] = pair[:, 0], pair[:, 1]
        rows[8 * i : 8 * i + 8] = matrix.T if "trans" in s.parts else matrix
    warp.block.shared.store(warp.address(target)[: rows.shape[0]], rows.view(np.uint8), "matrix")


OPERATIONS = {"mma": multiply, "wgmma": multiply_group, "ldmatrix": load_matrix, "stmatrix": store_matrix}
