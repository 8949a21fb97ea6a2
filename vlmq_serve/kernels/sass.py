"""Reads machine code of NVIDIA GPUs: the instructions of a cubin and its main loop. Needs no GPU.

Triton's wheel carries the disassembler. Imported by the tests and the benchmarks only.
"""

import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import triton

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_INSTRUCTION = re.compile(
    r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P[0-9T]+\s+)?([A-Z][A-Z0-9]*)((?:\.[A-Za-z0-9_]+)*)\s*([^;]*);"
)
CONVERSIONS = frozenset({"I2F", "I2FP", "F2F", "F2I"})
MATRIX = frozenset({"HGMMA", "HMMA"})
_GLOBAL_LOADS = frozenset({"LDG", "LDGSTS"})
_WIDTHS = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128}


class Instruction(NamedTuple):
    """For example (0x1a0, "LDGSTS", ".E.BYPASS.128", "[R1], [R2.64]")."""

    address: int
    op: str
    suffix: str
    operands: str


def disassemble(cubin: bytes) -> tuple[dict[str, int], list[Instruction]]:
    """Resource usage (REG, STACK, LOCAL) and instructions."""
    handle, path = tempfile.mkstemp(suffix=".cubin")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(cubin)
        usage = _tool("-res-usage", path)
        sass = _tool("-sass", path)
    finally:
        os.unlink(path)
    numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return numbers, [Instruction(int(m[1], 16), m[2], m[3], m[4].strip()) for m in _INSTRUCTION.finditer(sass)]


def _tool(*arguments: str) -> str:
    done = subprocess.run([str(_TOOLS / "cuobjdump"), *arguments], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def main_loop(code: list[Instruction]) -> list[Instruction]:
    """The innermost loop with the most matrix instructions; without any, the longest loop that holds no other."""
    loops = []
    for i in code:
        target = re.search(r"0x([0-9a-f]+)", i.operands)
        if i.op == "BRA" and target is not None and int(target[1], 16) < i.address:
            loops.append((int(target[1], 16), i.address))
    inner = [a for a in loops if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    bodies = [[i for i in code if first <= i.address <= last] for first, last in inner]
    return max(bodies, key=lambda body: (sum(i.op in MATRIX for i in body), len(body)), default=[])


def wide_share(code: list[Instruction]) -> float:
    """Share of the bytes of loads from global memory that loads of 128 bits bring; 0 without loads."""
    bits = [next((_WIDTHS[p] for p in i.suffix.split(".") if p in _WIDTHS), 32) for i in code if i.op in _GLOBAL_LOADS]
    return sum(b for b in bits if b == 128) / sum(bits) if bits else 0.0


def weights_in_registers(code: list[Instruction]) -> bool:
    """Whether the left operand of every warp-group matrix instruction is registers, not shared memory."""
    return all(re.match(r"R\d+, R\d+", i.operands) for i in code if i.op == "HGMMA")
