"""Token importance of VLMQ (arXiv 2508.03351, section 4): gradients of a local loss.

L = || A(F) - A(U) ||^2,  A(X) = X + attention(norm(X)),  F full-precision path, U quantized path
g_t = mean over channels |dL / dZ_t|,  Z the output of q, k, v or o, one backward pass for all four

Other losses of the paper's ablation: see `sources`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vlmq_serve.calibrate.capture import output_taps, require_grad
from vlmq_serve.calibrate.families.adapter import BlockForward

_MEAN_TOLERANCE = 1e-3


@dataclass(frozen=True)
class TokenImportance:
    """Token weights of one linear, one fp32 tensor [B, T] per batch: none negative, mean 1 over all tokens.

    `uniform` says that the gradients gave no information and all weights are 1.
    """

    weights: tuple[Tensor, ...]
    uniform: bool = False

    def __post_init__(self) -> None:
        total = sum(float(w.double().sum()) for w in self.weights)
        count = sum(w.numel() for w in self.weights)
        if any(bool((w < 0).any()) for w in self.weights) or abs(total / count - 1) > _MEAN_TOLERANCE:
            raise RuntimeError(f"token weights must be >= 0 with mean 1, got mean {total / count}")

    @property
    def effective_tokens(self) -> float:
        """Kish's effective sample size (sum l)^2 / sum l^2: how many equally weighted tokens the weights amount to.

        Where it is below the inputs of a linear, its Hessian knows less than the linear can use.
        """
        total = sum(float(w.double().sum()) for w in self.weights)
        return total**2 / sum(float(w.double().square().sum()) for w in self.weights)

    @classmethod
    def from_gradients(
        cls, gradients: Sequence[Tensor], exponent: float = 1, per_sample: bool = False
    ) -> "TokenImportance":
        """Weights g^exponent, scaled to mean 1; all ones where every gradient is zero or one is not finite.

        The gradients are zero in the first quantized layer (U equals F there), where the paper says nothing. The
        scale itself changes no solution: Hessian, residual and damping all scale with it. With `per_sample` every
        sample's weights have mean 1, so that no sample counts more because it has drifted further.
        """
        if per_sample:
            gradients = [_with_mean_one(g, exponent) for g in gradients]
            exponent = 1
        total = sum(float(g.double().sum()) for g in gradients)
        count = sum(g.numel() for g in gradients)
        mean = total / count
        if not 0 < mean < float("inf"):
            return cls(tuple(torch.ones_like(g) for g in gradients), uniform=True)
        # Divided first: raw values near 1e-8 would vanish in fp32 when squared.
        raised = [(g.double() / mean) ** exponent for g in gradients]
        scale = count / sum(float(r.sum()) for r in raised)
        return cls(tuple((r * scale).float() for r in raised))


def _with_mean_one(gradient: Tensor, exponent: float) -> Tensor:
    """Rows of [B, T] raised and divided by their means; ones where a row is all zero."""
    peak = gradient.amax(1, keepdim=True).double()
    raised = torch.where(peak > 0, gradient.double() / peak, 1.0) ** exponent
    return raised / raised.mean(1, keepdim=True)


def local_gradients(
    layer: nn.Module,
    forward: BlockForward,
    taps: Sequence[str],
    full: Tensor,
    quantized: Tensor,
    kwargs: Mapping[str, Any],
) -> dict[str, Tensor]:
    """g_t, fp32 [B, T], at each tap for the hidden states [B, T, C] of both paths.

    `forward` maps them to what the loss compares: A above, or another part of the layer. The layer has its
    full-precision weights in both terms; its parameters must not require gradients.
    """
    with torch.no_grad():
        target = forward(layer, full, kwargs)
    with torch.enable_grad(), output_taps(layer, taps, require_grad) as outputs:
        loss = (forward(layer, quantized, kwargs).float() - target.float()).square().sum()
        gradients = torch.autograd.grad(loss, [outputs[name] for name in taps])
    return {name: g.float().abs().mean(-1) for name, g in zip(taps, gradients, strict=True)}
