"""What PTX moves between registers, global and shared memory."""

import re
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from tests.kernels.ptx.arithmetic import TYPES
from tests.kernels.ptx.program import Address, NotModelledError, Operand, Statement

if TYPE_CHECKING:
    from tests.kernels.ptx.warp import Warp

WIDTHS = {"rs": 2, "r": 4, "rd": 8}


def _vector(operand: Operand) -> tuple[Operand, ...]:
    return operand if isinstance(operand, tuple) else (operand,)


def load(warp: "Warp", s: Statement) -> None:
    """ld from parameters, global or shared memory."""
    targets, source = _vector(s.operands[0]), s.operands[1]
    kind = TYPES[s.parts[-1]]
    space = s.parts[1]
    if space == "param":
        assert isinstance(source, Address)
        return _write(warp, targets[0], warp.read(warp.block.parameters[source.base], kind))
    at = warp.address(source)[warp.active]
    memory = warp.block.memory if space == "global" else warp.block.shared
    values = np.zeros((warp.lanes, len(targets)), kind)
    values[warp.active] = memory.load(at, kind.itemsize * len(targets)).view(kind)
    for target, column in zip(targets, values.T, strict=True):
        _write(warp, target, np.ascontiguousarray(column))


def _write(warp: "Warp", target: Operand, value: np.ndarray) -> None:
    """A loaded value, extended to the width of the register, which its name tells."""
    found = re.fullmatch(r"%(rd|rs|r)\d+", str(target))
    size = WIDTHS[found[1]] if found else value.itemsize
    warp.write(target, value.astype(f"{value.dtype.kind}{size}") if size > value.itemsize else value)


def store(warp: "Warp", s: Statement) -> None:
    """st to global or shared memory."""
    sources, kind = _vector(s.operands[1]), TYPES[s.parts[-1]]
    values = np.stack([_narrow(warp, o, kind) for o in sources], 1)[warp.active]
    at = warp.address(s.operands[0])[warp.active]
    memory = warp.block.memory if s.parts[1] == "global" else warp.block.shared
    memory.store(at, values.view(np.uint8))


def _narrow(warp: "Warp", source: Operand, kind: np.dtype[Any]) -> np.ndarray:
    """A register that may be wider than what is stored of it."""
    value = warp.values[source] if isinstance(source, str) else warp.read(source, kind)
    return value.astype(kind) if value.itemsize > kind.itemsize else value.view(kind)


def copy(warp: "Warp", s: Statement) -> None:
    """cp.async, in groups; bytes past those that are read become zero."""
    if s.parts[2] == "commit_group":
        return warp.copies.commit()
    if s.parts[2] == "wait_group":
        assert isinstance(s.operands[0], int)
        return warp.copies.wait(s.operands[0])
    to, source, size, *rest = s.operands
    assert isinstance(size, int)
    given = warp.read(rest[0] if rest else size, np.uint32)[warp.active]
    if not np.isin(given, (0, size)).all():
        raise NotModelledError(f"part of a copy: {s.text}")
    places, addresses, read = warp.address(to)[warp.active], warp.address(source)[warp.active], given > 0
    warp.copies.add(partial(_copy, warp, places, addresses, read, size))


def _copy(warp: "Warp", places: np.ndarray, addresses: np.ndarray, read: np.ndarray, size: int) -> None:
    data = np.zeros((places.size, size), np.uint8)
    if read.any():
        data[read] = warp.block.memory.load(addresses[read], size, "copy")
    warp.block.shared.store(places, data, "copy")


def add_atomically(warp: "Warp", s: Statement) -> None:
    """atom.add of 32 bits in global memory, a lane after the other."""
    if s.parts[-2:] != ("add", "u32"):
        raise NotModelledError(s.text)
    target, address, value = s.operands
    at, values = warp.address(address), warp.read(value, np.uint32)
    before = np.zeros(warp.lanes, np.uint32)
    for lane in np.flatnonzero(warp.active):
        one = at[lane : lane + 1]
        before[lane] = warp.block.memory.load(one, 4).view(np.uint32)[0, 0]
        warp.block.memory.store(one, (before[lane : lane + 1] + values[lane]).view(np.uint8)[None])
    warp.write(target, before)


OPERATIONS = {"ld": load, "st": store, "cp": copy, "atom": add_atomically}
