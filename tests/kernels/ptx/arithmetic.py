"""What PTX does to registers: integers, floats, predicates, conversions, moves and shuffles within a warp."""

import operator
from collections.abc import Callable
from typing import Any

import numpy as np

from tests.kernels.ptx import floats
from tests.kernels.ptx.program import NotModelledError, Statement
from tests.kernels.ptx.registers import Registers

TYPES: dict[str, Any] = {
    **{f"{name}{8 * size}": np.dtype(f"{kind}{size}") for name, kind in ("bu", "uu", "si") for size in (2, 4, 8)},
    "f32": np.dtype("f4"), "pred": np.dtype(bool),
}  # fmt: skip
COMPARE = {name: getattr(operator, name) for name in ("eq", "ne", "lt", "le", "gt", "ge")}
Function = Callable[..., np.ndarray]


def _shift(direction: Function) -> Function:
    def apply(a: np.ndarray, count: np.ndarray) -> np.ndarray:
        bits = 8 * a.itemsize
        count = count.astype(np.uint32)
        gone = np.where(a < 0, -1, 0).astype(a.dtype) if direction is np.right_shift else np.zeros_like(a)
        return np.where(count >= bits, gone, direction(a, np.minimum(count, bits - 1).astype(a.dtype)))

    return apply


def _divide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.trunc(a.astype(np.float64) / b.astype(np.float64)).astype(a.dtype)


FUNCTIONS: dict[str, Function] = {
    "add": operator.add, "sub": operator.sub, "mul": operator.mul, "div": _divide, "neg": operator.neg,
    "and": operator.and_, "or": operator.or_, "xor": operator.xor, "not": operator.invert,
    "min": np.minimum, "max": np.maximum,
    "mad": lambda a, b, c: a * b + c,
    "fma": lambda a, b, c: a * b + c,
}  # fmt: skip


def calculate(r: Registers, s: Statement) -> None:
    """Results of one type, or with `wide` of twice the size; floats in fp64, rounded to their type at the end."""
    name, *modifiers, kind = s.parts
    target, *sources = s.operands
    if not {"lo", "wide", "rn"}.issuperset(modifiers):
        raise NotModelledError(s.text)
    if kind in ("f32", "f16", "bf16", "f16x2", "bf16x2"):
        return _calculate_floats(r, s)
    if "wide" in modifiers:
        wide = TYPES[kind[0] + "64"]
        values = [r.read(o, TYPES[kind]).astype(wide) for o in sources[:2]]
        values += [r.read(o, wide) for o in sources[2:]]
    else:
        values = [r.read(o, TYPES[kind]) for o in sources]
    with np.errstate(over="ignore"):
        r.write(target, FUNCTIONS[name](*values))


def _calculate_floats(r: Registers, s: Statement) -> None:
    name, kind, (target, *sources) = s.parts[0], s.parts[-1], s.operands
    with np.errstate(over="ignore", invalid="ignore"):
        if kind == "f32":
            exact = FUNCTIONS[name](*(r.read(o, np.float32).astype(np.float64) for o in sources))
            return r.write(target, exact.astype(np.float32))
        size, bf16 = np.dtype(np.uint32 if kind.endswith("x2") else np.uint16), kind.startswith("b")
        halves = [floats.from_half(r.read(o, size).view(np.uint16), bf16) for o in sources]
        r.write(target, floats.to_half(FUNCTIONS[name](*halves), bf16).view(size))


def shift(r: Registers, s: Statement) -> None:
    """shl, shr: shifts of the width and more leave zeros, or signs."""
    target, value, count = s.operands
    function = _shift(np.left_shift if s.parts[0] == "shl" else np.right_shift)
    r.write(target, function(r.read(value, TYPES[s.parts[-1]]), r.read(count, np.uint32)))


def compare(r: Registers, s: Statement) -> None:
    """setp."""
    target, a, b = s.operands
    kind = TYPES[s.parts[2]]
    r.write(target, COMPARE[s.parts[1]](r.read(a, kind), r.read(b, kind)))


def select(r: Registers, s: Statement) -> None:
    """selp."""
    target, a, b, which = s.operands
    kind = TYPES[s.parts[-1]]
    r.write(target, np.where(r.read(which, bool), r.read(a, kind), r.read(b, kind)))


def extract(r: Registers, s: Statement) -> None:
    """bfe: `length` bits from bit `first` on, signed ones with their sign."""
    target, value, first, length = s.operands
    if not (isinstance(first, int) and isinstance(length, int) and length > 0 and first + length <= 32):
        raise NotModelledError(s.text)
    kind = TYPES[s.parts[-1]]
    up = (r.read(value, np.uint32) << np.uint32(32 - first - length)).view(kind)
    r.write(target, up >> kind.type(32 - length))


def permute(r: Registers, s: Statement) -> None:
    """prmt: each byte of the result is one of the eight of two registers."""
    target, low, high, selector = s.operands
    if not isinstance(selector, int) or selector & 0x8888:
        raise NotModelledError(s.text)
    kind = np.dtype(np.uint32)
    both = np.concatenate([r.read(o, kind)[:, None].view(np.uint8) for o in (low, high)], axis=1)
    chosen = both[:, [selector >> 4 * place & 0xF for place in range(4)]]
    r.write(target, np.ascontiguousarray(chosen).view(np.uint32)[:, 0])


def look_up(r: Registers, s: Statement) -> None:
    """lop3: bit i of the table is the result where the bits of the three operands are those of i."""
    target, *sources, table = s.operands
    if not isinstance(table, int):
        raise NotModelledError(s.text)
    values = [r.read(o, np.uint32) for o in sources]
    result = np.zeros(r.lanes, np.uint32)
    for i in range(8):
        if table >> i & 1:
            a, b, c = (v if i >> (2 - place) & 1 else ~v for place, v in enumerate(values))
            result |= a & b & c
    r.write(target, result)


def move(r: Registers, s: Statement) -> None:
    """mov, also from a vector of halves to a register and back."""
    target, source = s.operands
    kind = TYPES[s.parts[-1]]
    if isinstance(source, tuple):
        half = np.dtype(f"u{kind.itemsize // len(source)}")
        r.write(target, np.stack([r.read(o, half) for o in source], 1).view(kind)[:, 0])
    elif isinstance(target, tuple):
        half = np.dtype(f"u{kind.itemsize // len(target)}")
        parts = np.ascontiguousarray(r.read(source, kind))[:, None].view(half)
        for name, part in zip(target, parts.T, strict=True):
            r.write(name, np.ascontiguousarray(part))
    else:
        r.write(target, r.read(source, kind))


def convert(r: Registers, s: Statement) -> None:
    """cvt between integers, and between fp32 and 16-bit floats, one or two."""
    target, *sources = s.operands
    to, kind = s.parts[-2:]
    if not {"rn"}.issuperset(s.parts[1:-2]):
        raise NotModelledError(s.text)
    if to in ("bf16", "f16"):
        r.write(target, floats.to_half(r.read(sources[0], np.float32).astype(np.float64), to == "bf16"))
    elif to in ("bf16x2", "f16x2"):
        upper, lower = (floats.to_half(r.read(o, np.float32).astype(np.float64), to[0] == "b") for o in sources)
        r.write(target, np.stack([lower, upper], 1).view(np.uint32)[:, 0])
    elif kind in ("bf16", "f16"):
        r.write(target, floats.from_half(r.read(sources[0], np.uint16), kind == "bf16").astype(np.float32))
    else:
        r.write(target, r.read(sources[0], TYPES[kind]).astype(TYPES[to]))


def shuffle(r: Registers, s: Statement) -> None:
    """shfl.sync bfly and idx over the whole warp."""
    target, value, which, clamp, members = s.operands
    if (clamp, members) != (31, -1):
        raise NotModelledError(s.text)
    lanes, number = np.arange(r.lanes), r.read(which, np.uint32).astype(np.int64)
    source = {"bfly": lanes ^ number, "idx": number & 31}[s.parts[2]]
    r.write(target, r.read(value, np.uint32)[source])


OPERATIONS = {
    **dict.fromkeys(FUNCTIONS, calculate),
    "shl": shift, "shr": shift, "setp": compare, "selp": select, "bfe": extract, "prmt": permute, "lop3": look_up,
    "mov": move, "cvt": convert, "shfl": shuffle,
}  # fmt: skip


def do(r: Registers, s: Statement) -> None:
    """Run a statement that touches registers only."""
    if s.parts[0] not in OPERATIONS:
        raise NotModelledError(s.text)
    OPERATIONS[s.parts[0]](r, s)
