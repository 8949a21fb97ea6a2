"""Writes a table for one small layer in Triton's interpreter and multiplies by it: a JSON line with what happened.

Times of an interpreter mean nothing; that the fastest of them is found, written, read and used does.
"""

import json
import os
import sys
from pathlib import Path

from tests.kernels import triton_interpreter as runner  # isort: skip

import torch

from vlmq_serve.cli.bench.kernel_tables import write_table
from vlmq_serve.kernels import gpu, plan, tables, triton_path
from vlmq_serve.kernels.bench.layers import Layer, random_weight
from vlmq_serve.kernels.bench.measure import Settings
from vlmq_serve.kernels.prepared import linear, operand_of, prepare

SMALL = Layer("test", "small", 40, 512)
CPU = torch.device("cpu")


def main(path: Path) -> None:
    runner.fill_gaps()
    settings = Settings(CPU, torch.bfloat16, 0.0, 1e10)
    slow_vllm = {((4, 40, 512), 1): 1e9}
    fast_vllm = {((2, 40, 512), 1): 1e-9, ((2, 40, 512), 3): 1e-9}
    notes: list[str] = []
    table = write_table(path, [SMALL], [1, 3], ["w4g64", "w2g64"], settings, {}, slow_vllm | fast_vllm, notes.append)
    again = write_table(path, [SMALL], [1], ["w4g64"], settings, {"run": "2"}, {})
    os.environ[tables.ENVIRONMENT] = str(path)
    weight = random_weight(SMALL, runner.Scheme(4, 64), torch.bfloat16, CPU)
    prepared = prepare(weight, torch.bfloat16, CPU, "triton")
    shape = triton_path.shape_of(operand_of(prepared))
    x = torch.randn(1, 512).bfloat16()
    expected = x.double() @ weight.dequantize().double().T
    json.dump(
        {
            "first": [row.model_dump() for row in table.plans],
            "vllm": [row.model_dump() for row in table.vllm],
            "again": [[row.bits, row.M] for row in again.plans],
            "measured": [m for m, _ in shape.measured],
            "used": plan.plan(1, shape, gpu.ASSUMED) == shape.measured[0][1],
            "error": float((linear(x, prepared).double() - expected).norm() / expected.norm()),
            "notes": notes,
        },
        sys.stdout,
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
