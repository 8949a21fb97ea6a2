"""The token-level calibration set of TLQ (arXiv 2602.07899): which tokens of the samples count, and how much.

The paper's abstract says that gradients give every token an importance in the quantization error, and that a
token-level calibration set is built from it. The rest is ours: with a_t the gradient magnitude of the answers'
cross-entropy at the output of the block's last linear and a budget of n tokens per block,

    S   = the tokens of largest a_t > 0 of every modality, n / 3 each; what a modality lacks goes to the others
    l_t = a_t for t in S, else 0, scaled to mean 1
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from vlmq_serve.calibrate.importance import TokenImportance
from vlmq_serve.calibrate.samples import MODALITIES


def quotas(available: Sequence[int], budget: int) -> list[int]:
    """Tokens per modality: equal shares, and what one cannot fill is shared among those that can."""
    given = [0] * len(available)
    left = min(budget, sum(available))
    while left:
        open_ones = [i for i, count in enumerate(available) if given[i] < count]
        share = max(left // len(open_ones), 1)
        for i in open_ones:
            step = min(share, available[i] - given[i], left)
            given[i] += step
            left -= step
    return given


def choose_tokens(importance: Tensor, modality: Tensor, budget: int) -> Tensor:
    """bool [T]: the tokens of the set, from importance fp32 [T] and modality [T] of all samples in a row."""
    useful = [((modality == kind) & (importance > 0)).nonzero()[:, 0] for kind in range(len(MODALITIES))]
    chosen = torch.zeros_like(importance, dtype=torch.bool)
    for tokens, quota in zip(useful, quotas([len(tokens) for tokens in useful], budget), strict=True):
        chosen[tokens[importance[tokens].topk(quota).indices]] = True
    return chosen


def token_weights(
    gradients: Sequence[Tensor], modality: Sequence[Tensor], budget: int | None, exponent: float = 1
) -> TokenImportance:
    """l_t from gradient magnitudes [B, T] and modality [B, T] per batch; without a budget, half of the tokens."""
    flat = torch.cat([g.reshape(-1) for g in gradients])
    kinds = torch.cat([m.reshape(-1) for m in modality])
    chosen = choose_tokens(flat, kinds, len(flat) // 2 if budget is None else budget)
    parts = (flat * chosen).split([g.numel() for g in gradients])
    kept = [part.reshape(g.shape) for part, g in zip(parts, gradients, strict=True)]
    return TokenImportance.from_gradients(kept, exponent)
