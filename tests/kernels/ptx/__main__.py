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


def check(variant: Variant) -> tuple[str, float, bool]:
    """Name, relative error against float64, and whether both orders gave the same bits."""
    torch.set_num_threads(1)
    arguments = cases.case(variant)
    late, early = (cases.run(*arguments, seed=seed, late=seed == 1) for seed in (1, 2))
    same = torch.equal(late.y.view(torch.int16), early.y.view(torch.int16))
    return variant.name, relative_error(late.y, late.expected), same


def main() -> int:
    console = Console()
    chosen = [v for v in variants() if all(part in v.name for part in sys.argv[1:])]
    wrong = 0
    with ProcessPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        for name, error, same in pool.map(check, chosen):
            right = same and error < (4e-4 if "fp16" in name else 3e-3)
            wrong += not right
            console.print(f"{name:45s} error {error:.5f}{'' if right else ' [red]wrong[/red]'}")
    console.print(f"{len(chosen)} kernels ran, {wrong} of them wrong")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
