"""How far a model's next-token distributions are from those of a reference, on given questions and answers."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlmq_serve.calibrate.capture import group_by_length
from vlmq_serve.calibrate.samples import ANSWER, PROMPT, CalibrationSample

KINDS = {"prompt": PROMPT, "answer": ANSWER}


@dataclass(frozen=True)
class Divergence:
    """Mean KL(reference || model) in nats per predicted token; `prompt` and `answer` are what is predicted."""

    prompt: float
    answer: float


def kl_by_kind(reference: Tensor, model: Tensor, modality: Tensor) -> dict[str, tuple[float, int]]:
    """Sums of KL(reference || model) and counts of tokens, from logits [B, T, V] and modality [B, T].

    The distribution at position t predicts token t+1 and counts for the kind of that token. Positions before vision
    tokens are left out: nothing ever reads what is predicted there.
    """
    p, q = reference[:, :-1].float().log_softmax(-1), model[:, :-1].float().log_softmax(-1)
    divergence = (p.exp() * (p - q)).sum(-1).double()
    predicted = modality[:, 1:].to(divergence.device)
    return {
        name: (float(divergence[predicted == kind].sum()), int((predicted == kind).sum()))
        for name, kind in KINDS.items()
    }


@torch.inference_mode()
def measure_divergence(
    reference: Any, model: Any, samples: Iterable[CalibrationSample], batch_tokens: int = 4096
) -> Divergence:
    """Both models read each question with its expected answer (teacher forcing), equally long samples together."""
    totals = {name: [0.0, 0] for name in KINDS}
    for group in group_by_length(samples, batch_tokens):
        inputs = {key: torch.cat([s.inputs[key] for s in group]).to(model.device) for key in group[0].inputs}
        modality = torch.stack([s.modality for s in group])
        sums = kl_by_kind(_logits(reference, inputs), _logits(model, inputs), modality)
        for name, (divergence, count) in sums.items():
            totals[name][0] += divergence
            totals[name][1] += count
    means = {name: total / count if count else float("nan") for name, (total, count) in totals.items()}
    return Divergence(means["prompt"], means["answer"])


def _logits(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    logits: Tensor = model(**inputs, use_cache=False).logits
    return logits
