"""Cross-layer dependency of Q-VLM (Wang et al., NeurIPS 2024): which layers are searched together.

x_k are the outputs of decoder layer k on the unquantized path, q_1 ... q_M the levels of a uniform grid with step d:

    Eq. 5  p(x = q_m) = exp(-(x - q_m)^2 / d) / sum_m' exp(-(x - q_m')^2 / d)
    Eq. 4  D(k, k+1)  = - sum_ab p(a, b) log p(b | a)     p(a, b): mean over elements of p(x_k = a) p(x_k+1 = b)
    Eq. 6  D(r, s)    = sum of the D of neighbours from r to s
    Eq. 7  r ... s are one block if D(r, s) > (s - r) h0, at most three layers
"""

from collections.abc import Sequence

import torch
from torch import Tensor

MAX_DEPTH = 3
LEVELS = 16
_MAX_ELEMENTS = 2**18


def soft_assignment(values: Tensor, levels: int = LEVELS) -> Tensor:
    """Eq. 5: probabilities fp32 [n, M] of the levels of a grid over the range of `values` [n]."""
    values = values.float()
    grid = torch.linspace(float(values.min()), float(values.max()), levels, device=values.device)
    step = (grid[1] - grid[0]).clamp(min=torch.finfo(torch.float32).tiny)
    return torch.softmax(-(values[:, None] - grid).square() / step, 1)


def conditional_entropy(first: Tensor, second: Tensor, levels: int = LEVELS) -> float:
    """Eq. 4 in nats, from outputs of two neighbouring layers, equal in shape; every nth element of large ones."""
    stride = -(-first.numel() // _MAX_ELEMENTS)
    a, b = (soft_assignment(x.reshape(-1)[::stride], levels).double() for x in (first, second))
    joint = a.T @ b / a.shape[0]
    given = joint / joint.sum(1, keepdim=True).clamp(min=1e-300)
    return float(-(joint * given.clamp(min=1e-300).log()).sum())


def partition(dependencies: Sequence[float], threshold: float | None = None) -> list[int]:
    """Depths of the blocks in order, from D of neighbours; h0 is `threshold`, or the mean of D.

    A block grows from its first layer on as long as Eq. 7 holds.
    """
    h0 = sum(dependencies) / max(len(dependencies), 1) if threshold is None else threshold
    depths = [1]
    for layer in range(1, len(dependencies) + 1):
        start = layer - depths[-1]
        if depths[-1] < MAX_DEPTH and sum(dependencies[start:layer]) > (layer - start) * h0:
            depths[-1] += 1
        else:
            depths.append(1)
    return depths
