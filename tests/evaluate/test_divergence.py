"""KL divergence against a direct sum in float64, and its split into prompt and answer."""

import math

import torch

from vlmq_serve.calibrate.samples import ANSWER, PROMPT, VISION
from vlmq_serve.evaluate.divergence import before_text, kl_by_kind


def test_equals_the_definition_token_by_token():
    generator = torch.Generator().manual_seed(0)
    reference, model = (torch.randn(2, 6, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    kinds = [[PROMPT, VISION, VISION, PROMPT, ANSWER, ANSWER], [PROMPT, PROMPT, VISION, ANSWER, ANSWER, ANSWER]]
    expected = {PROMPT: 0.0, ANSWER: 0.0}
    for b in range(2):
        for t in range(5):
            p, q = (x[b, t].exp() / x[b, t].exp().sum() for x in (reference, model))
            if kinds[b][t + 1] != VISION:
                expected[kinds[b][t + 1]] += sum(float(p[v]) * math.log(float(p[v] / q[v])) for v in range(5))
    modality = torch.tensor(kinds, dtype=torch.uint8)
    (p, predicted), (q, _) = (before_text(logits, modality) for logits in (reference, model))
    got = kl_by_kind(p, q, predicted)
    assert got["prompt"][1] == 2
    assert got["answer"][1] == 5
    assert abs(got["prompt"][0] - expected[PROMPT]) < 1e-5
    assert abs(got["answer"][0] - expected[ANSWER]) < 1e-5


def test_equal_models_do_not_diverge():
    logits, kinds = before_text(torch.randn(1, 4, 7), torch.full((1, 4), ANSWER, dtype=torch.uint8))
    got = kl_by_kind(logits, logits + 3, kinds)
    assert got["answer"][1] == 3
    assert abs(got["answer"][0]) < 1e-6
    assert got["prompt"] == (0.0, 0)
