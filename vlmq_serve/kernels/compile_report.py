"""What the compiler makes of the Triton kernels for an architecture: registers, spills, shared memory, instructions.

Needs no GPU, driver or CUDA toolkit: Triton compiles for a named target. Imported by the tests and the benchmarks only.
"""

import collections
import hashlib
import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vlmq_serve.format.scheme import ALLOWED_BITS
from vlmq_serve.kernels import sass
from vlmq_serve.kernels.planes import PLANES, slab_length
from vlmq_serve.kernels.tiles import (
    DEQUANTIZE,
    SHARED_MEMORY,
    SHARED_MEMORY_ELSEWHERE,
    SUM_WARPS,
    Tile,
    gemv_tiles,
    known_tiles,
    narrow_tiles,
    tiles,
)
from vlmq_serve.kernels.triton_dequantize import dequantize_kernel
from vlmq_serve.kernels.triton_gemm import gemm_kernel, layout_constants, tile_constants
from vlmq_serve.kernels.triton_gemv import gemv_kernel
from vlmq_serve.kernels.triton_reduce import LAST, NONE, sum_kernel

GEMM, GEMV, WRITE, ADD = "gemm", "gemv", "dequantize", "sum"
KERNELS = {GEMM: gemm_kernel, GEMV: gemv_kernel, WRITE: dequantize_kernel, ADD: sum_kernel}


@dataclass(frozen=True)
class Variant:
    """One compiled kernel: the case it serves, its tile and the architecture.

    split: partial sums that the last program adds; tails: N and K that no tile divides; adds: `sum_kernel`, with the
    shape of a tile.
    """

    bits: int
    dtype: str
    group_size: int
    tile: Tile
    arch: int
    split: bool = False
    tails: bool = False
    adds: bool = False

    @property
    def warps(self) -> int:
        """Of the launch."""
        return SUM_WARPS if self.adds else self.tile.warps

    @property
    def kernel(self) -> str:
        """Key of KERNELS."""
        return ADD if self.adds else WRITE if self.tile == DEQUANTIZE else GEMV if self.tile.gemv else GEMM

    @property
    def name(self) -> str:
        """Key of the static table."""
        kind = f"w{self.bits}g{self.group_size} "
        width = "" if self.tile.rows_n == 128 else f"n{self.tile.rows_n}"
        work = self.kernel if self.kernel == WRITE else f"{self.kernel} m{self.tile.rows_m}{width}"
        more = f"{' split' if self.split else ''}{' tails' if self.tails else ''}"
        return f"sm_{self.arch} {'' if self.adds else kind}{self.dtype} {work}{more}"


@dataclass(frozen=True)
class Report:
    """One row of the static table.

    instructions and conversions: per weight, in the main loop where there is one; wide_loads: share of the bytes
    from global memory that loads of 128 bits bring there; plain_loads: loads that no pipeline runs ahead, each a wait
    for memory; matrix_waits: waits per matrix instruction of a warp group, 1 where the compiler runs them one by one;
    ordered: partial sums are published and read in the order that `triton_reduce` describes.
    """

    name: str
    registers: int
    stack_bytes: int
    shared_bytes: int
    spill_instructions: int
    instructions: float
    conversions: float
    wide_loads: float
    plain_loads: int
    matrix: str
    weights_in_registers: bool
    matrix_waits: float
    ordered: bool

    def fault(self, arch: int) -> str | None:
        """Why this kernel must not ship: it spills, or does not fit the shared memory of the architecture."""
        if self.stack_bytes or self.spill_instructions:
            return f"spills {self.stack_bytes} bytes, {self.spill_instructions} instructions"
        limit = SHARED_MEMORY.get(arch, SHARED_MEMORY_ELSEWHERE)
        return f"needs {self.shared_bytes} of {limit} bytes of shared memory" if self.shared_bytes > limit else None


COST = (
    "registers", "stack_bytes", "shared_bytes", "spill_instructions", "instructions", "conversions", "plain_loads",
    "matrix_waits",
)  # fmt: skip


def worse(report: Report, row: Mapping[str, str]) -> dict[str, tuple[object, str]]:
    """What got worse than a row of the committed table: name to (now, then)."""
    found = {c: (getattr(report, c), row[c]) for c in COST if getattr(report, c) > float(row[c])}
    if report.wide_loads < float(row["wide_loads"]):
        found["wide_loads"] = (report.wide_loads, row["wide_loads"])
    lost = [c for c in ("weights_in_registers", "ordered") if row[c] == "True" and not getattr(report, c)]
    return found | {c: (False, "True") for c in lost}


def variants() -> Iterator[Variant]:
    """Every case of the table.

    On sm_80 and sm_90 at group 128 every width and tile, in both types and, in bf16, which has the most to keep in
    registers, with a split K and in the most general form; other groups at one row and at few on sm_90; on sm_89,
    which differs from sm_80 by its shared memory, the general form; dequantizing and adding kernels.
    """
    for bits in ALLOWED_BITS:
        for arch in (80, 90):
            yield from _of_width(bits, arch)
        yield from (Variant(bits, "bf16", 128, t, 89, True, True) for t in known_tiles(bits, 89))
        for group, tile in itertools.product((32, 64, -1), (tiles(bits, 90)[0], gemv_tiles(bits)[0])):
            yield Variant(bits, "bf16", group, tile, 90)
    for arch in (80, 90):
        yield from (Variant(4, "bf16", 128, t, arch, tails=True, adds=True) for t in tiles(4, arch)[::2])


def _of_width(bits: int, arch: int) -> Iterator[Variant]:
    usual = (*gemv_tiles(bits), *tiles(bits, arch), DEQUANTIZE)
    yield from (Variant(bits, dtype, 128, t, arch) for dtype in ("bf16", "fp16") for t in usual)
    yield from (Variant(bits, "bf16", 128, t, arch, True) for t in usual[:-1])
    yield from (Variant(bits, "bf16", 128, t, arch, t != DEQUANTIZE, True) for t in usual)
    yield from (Variant(bits, "bf16", 128, t, arch, True, True) for t in narrow_tiles(bits, arch))


def kernel_version() -> str:
    """Changes with the source of the kernels, and with it every row of the table may."""
    sources = "".join(kernel.cache_key for kernel in KERNELS.values())
    return hashlib.sha256(sources.encode()).hexdigest()[:12]


def compile_variant(variant: Variant) -> Report:
    """Compile for the architecture and read the result; K and N are those of a large layer."""
    tile = variant.tile
    slab = slab_length(_COLS, _group(variant), variant.bits)
    found = compiled(variant, slab)
    usage, code = sass.disassemble(found.asm["cubin"])
    loop = sass.main_loop(code) if variant.kernel in (GEMM, GEMV) else code
    count = collections.Counter(i.op for i in loop)
    weights = tile.rows_m * tile.rows_n if variant.adds else slab // tile.parts * tile.rows_n
    per_weight = variant.warps * 32 / weights
    groups = count["HGMMA"]
    waits = sum(i.op == "WARPGROUP" and i.suffix.startswith(".DEPBAR") for i in loop)
    return Report(
        name=variant.name,
        registers=usage["REG"],
        stack_bytes=usage["STACK"] + usage["LOCAL"],
        shared_bytes=found.metadata.shared,
        spill_instructions=sum(i.op in ("LDL", "STL") for i in code),
        instructions=round(len(loop) * per_weight, 2),
        conversions=round(sum(count[op] for op in sass.CONVERSIONS) * per_weight, 2),
        wide_loads=round(sass.wide_share(loop), 2),
        plain_loads=count["LDG"],
        matrix="HGMMA" if groups else "HMMA" if count["HMMA"] else "",
        weights_in_registers=sass.weights_in_registers(code),
        matrix_waits=round(waits / groups, 2) if groups else 0.0,
        ordered=not variant.split or publishes_in_order(found.asm["ptx"]),
    )


_COLS = 4096


def _group(variant: Variant) -> int:
    return _COLS if variant.group_size == -1 else variant.group_size


def _constants(variant: Variant, slab: int) -> dict[str, Any]:
    width = slab // PLANES[variant.bits]
    layout = layout_constants(variant.bits, width, _group(variant), _COLS, variant.dtype == "bf16")
    rest = {"REDUCE": LAST if variant.split else NONE, "EVEN_N": not variant.tails, "EVEN_K": not variant.tails}
    return {**layout, **tile_constants(variant.tile), **rest}


def compiled(variant: Variant, slab: int) -> Any:
    """Triton's compiled kernel for slabs of that many codes: assembly by kind, and metadata."""
    kernel = KERNELS[variant.kernel]
    names = kernel.arg_names
    fixed = {name: value for name, value in _constants(variant, slab).items() if name in names}
    kind = f"*{variant.dtype}"
    types = {"x_ptr": kind, "w_ptr": "*i16", "g_ptr": "*i32", "y_ptr": kind, "parts_ptr": "*fp32", "count_ptr": "*i32"}
    signature = {n: "constexpr" if n in fixed else types.get(n, "i32") for n in names}
    sizes = ("K",) if variant.tails else ("N", "K")
    # What the launcher finds out about the arguments of a large layer: pointers and sizes divide by 16.
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n in types or n in sizes}
    source = ASTSource(fn=kernel, signature=signature, constexprs=fixed, attrs=aligned)
    options = {"num_warps": variant.warps, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", variant.arch, 32), options=options)


def publishes_in_order(ptx: str) -> bool:
    """Stores, barrier, one atomic that acquires and releases for the whole GPU, barrier, loads that bypass L1."""
    lines = [line.strip() for line in ptx.splitlines()]
    atomics = [i for i, line in enumerate(lines) if re.match(r"(@%p\d+ )?atom\.", line)]
    if len(atomics) != 1:
        return False
    at = atomics[0]
    stores = [i for i, line in enumerate(lines[:at]) if "st.global" in line]
    loads = [i for i, line in enumerate(lines) if i > at and "ld.global" in line]
    strong = all(part in lines[at] for part in (".acq_rel", ".gpu", ".global"))
    return (
        strong
        and bool(stores and loads)
        and any(line.startswith("bar.sync") for line in lines[stores[-1] : at])
        and any(line.startswith("bar.sync") for line in lines[at : loads[0]])
        and all("ld.global.cg" in lines[i] for i in loads)
    )
