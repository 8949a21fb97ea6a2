"""What the compiler makes of the Triton kernel for an architecture: registers, spills, shared memory, instructions.

Needs no GPU, driver or CUDA toolkit: Triton compiles for a named target, and its wheel carries ptxas and the
disassembler. Imported by the tests and the benchmarks only.
"""

import collections
import hashlib
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vlmq_serve.kernels.planes import PLANES, slab_length
from vlmq_serve.kernels.tiles import DEQUANTIZE, SHARED_MEMORY, SHARED_MEMORY_ELSEWHERE, Tile, tiles
from vlmq_serve.kernels.triton_dequantize import dequantize_kernel
from vlmq_serve.kernels.triton_gemm import constants, gemm_kernel

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_INSTRUCTION = re.compile(
    r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P[0-9T]+\s+)?([A-Z][A-Z0-9]*)((?:\.[A-Za-z0-9_]+)*)\s*([^;]*);"
)
_CONVERSIONS = frozenset({"I2F", "I2FP", "F2F", "F2I"})
_MATRIX = frozenset({"HGMMA", "HMMA"})


@dataclass(frozen=True)
class Variant:
    """One compiled kernel: the case it serves, its tile and the architecture.

    `tails` is the general form: N and K that no tile divides, and partial sums of a split K.
    """

    bits: int
    dtype: str
    group_size: int
    zeros: bool
    tile: Tile
    arch: int
    tails: bool = False

    @property
    def name(self) -> str:
        """Key of the static table."""
        kind = f"g{self.group_size}{'' if self.zeros else 's'}"
        work = f"m{self.tile.rows_m}" if self.multiplies else "dequantize"
        return f"sm_{self.arch} w{self.bits}{kind} {self.dtype} {work}{' tails' if self.tails else ''}"

    @property
    def multiplies(self) -> bool:
        """False for the kernel that only writes weights."""
        return self.tile != DEQUANTIZE


@dataclass(frozen=True)
class Report:
    """One row of the static table; instructions and conversions are per weight, in the main loop where there is one."""

    name: str
    registers: int
    stack_bytes: int
    shared_bytes: int
    spill_instructions: int
    instructions: float
    conversions: float
    matrix: str
    weights_in_registers: bool

    def fault(self, arch: int) -> str | None:
        """Why this kernel must not ship: it spills, or does not fit the shared memory of the architecture."""
        if self.stack_bytes or self.spill_instructions:
            return f"spills {self.stack_bytes} bytes, {self.spill_instructions} instructions"
        limit = SHARED_MEMORY.get(arch, SHARED_MEMORY_ELSEWHERE)
        return f"needs {self.shared_bytes} of {limit} bytes of shared memory" if self.shared_bytes > limit else None


def variants() -> Iterator[Variant]:
    """Every case of the table.

    All widths, types and tiles on sm_80 and sm_90 at group 128, and their general form in bf16, which has the most to
    keep in registers; the other groups and symmetry at small M on sm_90; on sm_89, which differs
    from sm_80 by its shared memory, the general form of its tiles; and the dequantizing kernel in both forms.
    """
    for bits in (2, 3, 4):
        for arch in (80, 90):
            family = tiles(bits, arch)
            yield from (Variant(bits, dtype, 128, True, t, arch) for dtype in ("bf16", "fp16") for t in family)
            yield from (Variant(bits, "bf16", 128, True, t, arch, tails=True) for t in family)
            yield from (Variant(bits, dtype, 128, True, DEQUANTIZE, arch) for dtype in ("bf16", "fp16"))
            yield Variant(bits, "bf16", 128, True, DEQUANTIZE, arch, tails=True)
        yield from (Variant(bits, "bf16", 128, True, t, 89, tails=True) for t in tiles(bits, 89))
        for group, zeros in ((32, True), (64, True), (-1, True), (128, False)):
            yield Variant(bits, "bf16", group, zeros, tiles(bits, 90)[0], 90)


def kernel_version() -> str:
    """Changes with the source of the kernels, and with it every row of the table may."""
    return hashlib.sha256((gemm_kernel.cache_key + dequantize_kernel.cache_key).encode()).hexdigest()[:12]


def compile_variant(variant: Variant) -> Report:
    """Compile for the architecture and read the result; K and N are those of a large, evenly divisible layer."""
    bits, tile = variant.bits, variant.tile
    cols = 4096
    group = cols if variant.group_size == -1 else variant.group_size
    slab = slab_length(cols, group, bits)
    fixed = constants(bits, slab // PLANES[bits], group, cols, variant.zeros, variant.dtype == "bf16", tile)
    fixed |= {"SPLIT": 4 if variant.tails else 1, "EVEN_N": not variant.tails, "EVEN_K": not variant.tails}
    if not variant.multiplies:
        fixed = {name: value for name, value in fixed.items() if name not in ("BM", "STAGES", "SPLIT")}
    compiled = _compile(fixed, variant)
    usage, code = _disassemble(compiled.asm["cubin"])
    loop = _main_loop(code) if variant.multiplies else code
    count = collections.Counter(op for _, op, _, _ in loop)
    per_weight = tile.warps * 32 / (slab * tile.rows_n)
    wgmma = [operands for _, op, _, operands in code if op == "HGMMA"]
    in_registers = bool(wgmma) and all(re.match(r"R\d+, R\d+", operands) for operands in wgmma)
    return Report(
        name=variant.name,
        registers=usage["REG"],
        stack_bytes=usage["STACK"] + usage["LOCAL"],
        shared_bytes=compiled.metadata.shared,
        spill_instructions=sum(op in ("LDL", "STL") for _, op, _, _ in code),
        instructions=round(len(loop) * per_weight, 2),
        conversions=round(sum(count[op] for op in _CONVERSIONS) * per_weight, 2),
        matrix="HGMMA" if wgmma else "HMMA" if variant.multiplies else "",
        weights_in_registers=in_registers or not wgmma,
    )


def _compile(fixed: dict[str, Any], variant: Variant) -> Any:
    kind = f"*{variant.dtype}"
    types = {"x_ptr": kind, "w_ptr": "*i16", "s_ptr": kind, "z_ptr": kind, "y_ptr": kind}
    if variant.tails and variant.multiplies:
        types["y_ptr"] = "*fp32"
    kernel = gemm_kernel if variant.multiplies else dequantize_kernel
    names = kernel.arg_names
    signature = {n: "constexpr" if n in fixed else types.get(n, "i32") for n in names}
    sizes = ("K",) if variant.tails else ("N", "K", "start", "stop")
    # What the launcher finds out about the arguments of a large layer: pointers and sizes divide by 16.
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n in types or n in sizes}
    source = ASTSource(fn=kernel, signature=signature, constexprs=fixed, attrs=aligned)
    options = {"num_warps": variant.tile.warps, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", variant.arch, 32), options=options)


def _disassemble(cubin: bytes) -> tuple[dict[str, int], list[tuple[int, str, str, str]]]:
    handle, path = tempfile.mkstemp(suffix=".cubin")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(cubin)
        usage = _tool("-res-usage", path)
        sass = _tool("-sass", path)
    finally:
        os.unlink(path)
    numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    code = [(int(m[1], 16), m[2], m[3], m[4].strip()) for m in _INSTRUCTION.finditer(sass)]
    return numbers, code


def _tool(*arguments: str) -> str:
    done = subprocess.run([str(_TOOLS / "cuobjdump"), *arguments], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def _main_loop(code: list[tuple[int, str, str, str]]) -> list[tuple[int, str, str, str]]:
    """Instructions of the innermost loop with the most matrix instructions."""
    best: list[tuple[int, str, str, str]] = []
    for address, op, _, operands in code:
        target = re.search(r"0x([0-9a-f]+)", operands)
        if op != "BRA" or target is None or int(target[1], 16) >= address:
            continue
        body = [i for i in code if int(target[1], 16) <= i[0] <= address]
        rank = (sum(i[1] in _MATRIX for i in body), -len(body))
        if not best or rank > (sum(i[1] in _MATRIX for i in best), -len(best)):
            best = body
    return best
