"""Makes `golden_gptq.json`: codes of GPTQ by llm-compressor, an implementation independent of ours.

    pip install --no-deps --target EXTRA llmcompressor==0.14.0.1 compressed-tensors==0.20.0   (and what they import)
    PYTHONPATH=.:EXTRA python -m tests.calibrate.golden_gptq

It gets our min-max grids, since its own observer rounds scales elsewhere, and the same Hessian and damping. Its
`actorder: weight` is our `act_order` with static groups.
"""

import json
from pathlib import Path

import torch
from torch import Tensor

from vlmq_serve.calibrate.solvers.grid import fit_grid, group_weight
from vlmq_serve.format.scheme import Scheme

GOLDEN = Path(__file__).with_suffix(".json")
ROWS, COLUMNS, TOKENS, PERCDAMP = 8, 64, 256, 0.01
CASES = [(f"w{bits}g{group}{s}", act) for bits in (2, 3, 4) for group in (32, -1) for s in ("", "s") for act in (0, 1)]


def layer() -> tuple[Tensor, Tensor]:
    """Weight [N, K] and Hessian [K, K], fp32, from a linear congruential generator: the same with every torch."""
    state, values = 12345, []
    for _ in range(ROWS * COLUMNS + TOKENS * COLUMNS):
        state = (1103515245 * state + 12345) % 2**31
        values.append(state / 2**30 - 1)
    numbers = torch.tensor(values, dtype=torch.float64)
    weight, inputs = numbers[: ROWS * COLUMNS].view(ROWS, COLUMNS), numbers[ROWS * COLUMNS :].view(TOKENS, COLUMNS)
    inputs = (inputs + 0.8 * inputs.roll(1, 1) + 0.6 * inputs[:, :1]) * (1 + torch.arange(COLUMNS) % 5)
    return weight.float(), (inputs.T @ inputs / TOKENS).float()


def main() -> None:
    """Run every case and write the file."""
    codes = {f"{scheme} act_order={act}": _codes(Scheme.parse(scheme), bool(act)) for scheme, act in CASES}
    GOLDEN.write_text(json.dumps(codes, indent=1) + "\n", encoding="utf-8")


def _codes(scheme: Scheme, act_order: bool) -> list[str]:
    """Rows of digits."""
    from compressed_tensors.quantization import QuantizationArgs
    from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight

    weight, hessian = layer()
    grid = fit_grid(group_weight(weight, scheme), scheme, torch.bfloat16)
    group = scheme.group_length(COLUMNS)
    order = "weight" if act_order else None
    settings = QuantizationArgs(
        num_bits=scheme.bits, symmetric=False, strategy="group", group_size=group, actorder=order
    )
    scales, zeros = grid.scales.float(), grid.zeros - scheme.mid_code  # its codes are signed
    rounded, _, fallback = quantize_weight(
        weight[None].clone(), hessian[None].clone(), scales[None], zeros[None], None, settings, percdamp=PERCDAMP
    )
    assert not fallback.any()
    wide = [t.repeat_interleave(group, 1) for t in (scales, grid.zeros)]
    codes = (rounded[0] / wide[0] + wide[1]).round().int()
    return ["".join(f"{code:x}" for code in row) for row in codes.tolist()]


if __name__ == "__main__":
    main()
