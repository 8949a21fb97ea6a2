"""Runs Triton cases on the CPU in a process of its own: JSON cases on stdin, one JSON result per case on stdout.

Triton's interpreter has three gaps that these kernels meet: it refuses inline assembly, it multiplies the bit
patterns of bf16 operands in `tl.dot`, and it truncates where `.to(bfloat16)` rounds to nearest on a GPU. They are
filled here, in the process that only runs tests; the kernels are the ones that the GPU gets. What an interpreter
cannot show: races, layouts, asynchronous copies.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"

import hashlib
import json
import sys

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

from tests.kernels.ptx import arithmetic
from tests.kernels.ptx.floats import from_bf16, to_bf16
from tests.kernels.ptx.program import parse_assembly
from tests.kernels.ptx.registers import Registers
from vlmq_serve.format.scheme import Scheme
from vlmq_serve.format.weight import PackedWeight
from vlmq_serve.kernels import linear, plan, prepare, scratch

SCRATCH_MAX = plan.SCRATCH_MAX


def run_ptx(text: str, inputs: list[np.ndarray], outputs: int) -> list[np.ndarray]:
    """Values of the output registers $0, $1, … after an inline assembly block; the inputs, uint32, follow them."""
    registers = Registers(inputs[0].size, {f"${i + outputs}": value for i, value in enumerate(inputs)})
    for statement in parse_assembly(text).statements:
        arithmetic.do(registers, statement)
    return [registers.values[f"${i}"] for i in range(outputs)]


class AssemblyResult:
    def __init__(self, handle: interpreter.TensorHandle) -> None:
        self.handle = handle

    def get_result(self, _index: int) -> interpreter.TensorHandle:
        return self.handle


def create_inline_asm(_builder, text, constraints, values, types, _pure, pack):
    shape = values[0].data.shape
    arrays = [np.ascontiguousarray(v.data).reshape(-1) for v in values]
    if any(a.itemsize * pack != 4 for a in arrays):
        raise NotImplementedError("inline assembly on registers that are not filled exactly")
    results = run_ptx(text, [a.view(np.uint32) for a in arrays], constraints.count("="))
    element = types[0].element_ty if isinstance(types[0], tl.block_type) else types[0]
    # One register holds two results of 16 bits, or two registers hold one of 32 bits each.
    kinds = {tl.bfloat16: np.uint16, tl.float16: np.float16, tl.int16: np.int16, tl.float32: np.float32}
    data = np.stack(results, -1).view(kinds[element]).reshape(shape)
    return AssemblyResult(interpreter.TensorHandle(data, element))


class ShuffledGrid:
    """Makes programs run in an order of its own: which one arrives last must not show in the result."""

    def __init__(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        self.seed = seed
        self.builder = interpreter.interpreter_builder
        self.set_dim, self.set_idx = self.builder.set_grid_dim, self.builder.set_grid_idx

    def grid_dim(self, *dims: int) -> None:
        self.dims = dims
        self.order = self.random.permutation(int(np.prod(dims)))
        self.set_dim(*dims)

    def grid_idx(self, *index: int) -> None:
        place = self.order[np.ravel_multi_index(index, self.dims)]
        self.set_idx(*(int(i) for i in np.unravel_index(place, self.dims)))

    def __enter__(self) -> None:
        if self.seed:
            self.builder.set_grid_dim, self.builder.set_grid_idx = self.grid_dim, self.grid_idx

    def __exit__(self, *_: object) -> None:
        self.builder.set_grid_dim, self.builder.set_grid_idx = self.set_dim, self.set_idx


def create_dot(_builder, a, b, d, _precision, _imprecise):
    left, right = (
        from_bf16(h.data).astype(np.float32) if h.get_element_ty() == tl.bfloat16 else h.data for h in (a, b)
    )
    return interpreter.TensorHandle(np.matmul(left, right, dtype=np.float32) + d.data, d.dtype)


def create_fp_trunc(builder, source, target):
    if source.get_element_ty() == tl.float32 and target.scalar == tl.bfloat16:
        return interpreter.TensorHandle(to_bf16(source.data), tl.bfloat16)
    return builder.cast_impl(source, target)


def run_case(case: dict) -> dict:
    dtype = getattr(torch, case["dtype"])
    rows, cols, bits = case["n"], case["k"], case["bits"]
    scheme = Scheme(bits, case["group"], case["symmetric"])
    generator = torch.Generator().manual_seed(bits + rows + cols)
    shape = (rows, scheme.num_groups(cols))
    codes = torch.randint(0, 2**bits, (rows, cols), generator=generator)
    if case["identity"]:
        codes = torch.arange(cols).remainder(2**bits).expand(rows, cols)
    # Scales over four binades and down to small ones: a subnormal intermediate in fp16 would show.
    scales = (torch.rand(shape, generator=generator) + 0.5) * 2.0 ** -torch.randint(5, 10, shape, generator=generator)
    zeros = None if scheme.symmetric else torch.randint(0, 2**bits, shape, generator=generator)
    if case["identity"]:
        zeros = torch.arange(rows)[:, None]
    weight = PackedWeight.from_codes(codes, scales.to(dtype), zeros, scheme)
    x = torch.eye(cols) if case["identity"] else torch.randn(case["m"], cols, generator=generator)
    x = x.to(dtype)
    plan.MAX_SPLIT = case["split"]
    plan.SCRATCH_MAX = case["scratch"] or SCRATCH_MAX
    prepared = prepare(weight, dtype, "cpu", case["path"])
    with ShuffledGrid(case["order"]):
        y = linear(x, prepared)
    dense = weight.dequantize()
    expected = x.double() @ dense.double().T
    plain = torch.nn.functional.linear(x.float(), dense.to(dtype).float()).to(dtype)

    def error(got: torch.Tensor) -> float:
        return float((got.double() - expected).norm() / expected.norm()) if expected.numel() else 0.0

    settled = not bool((scratch.counters(torch.device("cpu")) % plan.ARRIVALS).any())
    digest = hashlib.sha256(y.view(torch.int16).numpy().tobytes()).hexdigest()
    return {"shape": list(y.shape), "dtype": str(y.dtype), "error": error(y), "plain": error(plain),
            "digest": digest, "settled": settled,
            "same_bits": bool(case["identity"]) and torch.equal(y.t(), dense.to(dtype))}  # fmt: skip


def fill_gaps() -> None:
    interpreter.InterpreterBuilder.create_inline_asm = create_inline_asm
    interpreter.InterpreterBuilder.create_dot = create_dot
    interpreter.InterpreterBuilder.create_fp_trunc = create_fp_trunc


def main() -> None:
    fill_gaps()
    results = {case["id"]: run_case(case) for case in json.load(sys.stdin)}
    sys.stdout.write(json.dumps(results))


if __name__ == "__main__":
    main()
