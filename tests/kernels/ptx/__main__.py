"""Runs the whole static table, or the variants whose name contains every argument: minutes.

python -m tests.kernels.ptx
python -m tests.kernels.ptx sm_90 w3 gemm
"""

import os
import sys
from concurrent.futures import ProcessPoolExecutor

import torch
from rich.console import Console

from tests.kernels.ptx import cases
from tests.kernels.weights import relative_error
from vlmq_serve.kernels.compile_report import Variant, variants

LIMIT = {"bf16": 3e-3, "fp16": 4e-4}
"""Of the relative error: that of rounding y and a weight to the type."""


def check(variant: Variant) -> tuple[str, bool]:
    """What was seen, and whether it is right: close to float64, and the same bits in both orders."""
    torch.set_num_threads(1)
    try:
        arguments = cases.case(variant)
        late, early = (cases.run(*arguments, seed=seed, late=seed == 1) for seed in (1, 2))
    except Exception as error:
        return f"{type(error).__name__}: {error}", False
    same = torch.equal(late.y.view(torch.int16), early.y.view(torch.int16))
    error = relative_error(late.y, late.expected)
    return f"error {error:.5f}{'' if same else ', other bits in another order'}", same and error < LIMIT[variant.dtype]


def main() -> int:
    console = Console()
    chosen = [v for v in variants() if all(part in v.name for part in sys.argv[1:])]
    wrong = 0
    with ProcessPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        for variant, (seen, right) in zip(chosen, pool.map(check, chosen), strict=True):
            wrong += not right
            console.print(f"{variant.name:45s} {seen}{'' if right else ' [red]wrong[/red]'}")
    console.print(f"{len(chosen)} kernels ran, {wrong} of them wrong")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
