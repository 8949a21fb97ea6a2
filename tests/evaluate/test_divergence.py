"""KL divergence against a direct sum in float64, and its split into prompt and answer."""

import math

import torch

from vlmq_serve.calibrate.samples import ANSWER, PROMPT, VISION
from vlmq_serve.evaluate.divergence import kl_by_kind


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
    got = kl_by_kind(reference, model, torch.tensor(kinds, dtype=torch.uint8))
    assert got["prompt"][1] == 2
    assert got["answer"][1] == 5
    assert abs(got["prompt"][0] - expected[PROMPT]) < 1e-5
    assert abs(got["answer"][0] - expected[ANSWER]) < 1e-5


def test_equal_models_do_not_diverge():
    logits = torch.randn(1, 4, 7)
    got = kl_by_kind(logits, logits + 3, torch.full((1, 4), ANSWER, dtype=torch.uint8))
    assert abs(got["answer"][0]) < 1e-6
    assert got["prompt"] == (0.0, 0)
