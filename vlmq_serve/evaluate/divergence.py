"""How far a model's next-token distributions are from those of a reference, on given questions and answers."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vlmq_serve.calibrate.capture import batch_inputs, group_by_length
from vlmq_serve.calibrate.samples import ANSWER, PROMPT, VISION, CalibrationSample

KINDS = {"prompt": PROMPT, "answer": ANSWER}
BATCH_TOKENS = 4096
_ROWS_AT_ONCE = 512  # of logits: 300 MiB in fp32 with a vocabulary of 152k


@dataclass(frozen=True)
class Divergence:
    """Mean KL(reference || model) in nats per predicted token; `prompt` and `answer` are what is predicted."""

    prompt: float
    answer: float


@dataclass(frozen=True)
class Predictions:
    """All next-token distributions of a model that count, without the model: logits are `head(states)`.

    `states` are [n, C] per batch, on the CPU in the model's dtype. Logits would be V / C times as large: 600 KiB per
    token in fp32 with a vocabulary of 152k, for the 14 KiB of a 7B's states.
    """

    states: tuple[Tensor, ...]
    head: nn.Module


def before_text(states: Tensor, modality: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of states [B, T, C] that predict a text token, [n, C], and the kinds of these tokens, [n].

    What stands at position t predicts token t+1. Positions before vision tokens are left out: nothing ever reads what
    is predicted there.
    """
    predicted = modality[:, 1:].to(states.device)
    counts = predicted != VISION
    return states[:, :-1][counts], predicted[counts]


def kl_by_kind(reference: Tensor, model: Tensor, kinds: Tensor) -> dict[str, tuple[float, int]]:
    """Sums of KL(reference || model) and counts of tokens, from logits [n, V] and kinds [n] of what is predicted."""
    p, q = reference.float().log_softmax(-1), model.float().log_softmax(-1)
    divergence = (p.exp() * (p - q)).sum(-1).double()
    return {name: (float(divergence[kinds == kind].sum()), int((kinds == kind).sum())) for name, kind in KINDS.items()}


@torch.inference_mode()
def predict(model: Any, samples: Iterable[CalibrationSample], batch_tokens: int = BATCH_TOKENS) -> Predictions:
    """What `measure_divergence` needs of a reference, which may be gone when the model to compare is loaded."""
    states = tuple(states.cpu() for states, _ in _text_states(model, samples, batch_tokens))
    return Predictions(states, model.get_output_embeddings())


@torch.inference_mode()
def measure_divergence(
    reference: Predictions, model: Any, samples: Iterable[CalibrationSample], batch_tokens: int = BATCH_TOKENS
) -> Divergence:
    """The model reads each question with its expected answer (teacher forcing), as the reference has read the same
    samples in the same order."""
    totals = {name: [0.0, 0] for name in KINDS}
    head = model.get_output_embeddings()
    batches = zip(reference.states, _text_states(model, samples, batch_tokens), strict=True)
    for wanted, (states, kinds) in batches:
        parts = (part.split(_ROWS_AT_ONCE) for part in (wanted.to(model.device), states, kinds))
        for p, q, kind in zip(*parts, strict=True):
            for name, (divergence, count) in kl_by_kind(reference.head(p), head(q), kind).items():
                totals[name][0] += divergence
                totals[name][1] += count
    means = {name: total / count if count else float("nan") for name, (total, count) in totals.items()}
    return Divergence(means["prompt"], means["answer"])


def _text_states(
    model: Any, samples: Iterable[CalibrationSample], batch_tokens: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """`before_text` of what the head reads, batch by batch of equally long samples."""
    for group in group_by_length(samples, batch_tokens):
        read = model.base_model(**batch_inputs(group, model.device), use_cache=False).last_hidden_state
        yield before_text(read, torch.stack([sample.modality for sample in group]))
