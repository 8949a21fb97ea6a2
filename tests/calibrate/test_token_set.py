"""TLQ's token-level set against a choice made by hand, and through the pipeline."""

import csv
import json

import pytest
import torch

from vlmq_serve.calibrate.pipeline import calibrate
from vlmq_serve.calibrate.recipe import make_recipe
from vlmq_serve.calibrate.samples import ANSWER, PROMPT, VISION
from vlmq_serve.calibrate.token_set import choose_tokens, quotas, token_weights
from vlmq_serve.format.errors import VLMQError


@pytest.mark.parametrize(
    ("available", "budget", "expected"),
    [
        ([100, 100, 100], 30, [10, 10, 10]),
        ([100, 100, 4], 30, [13, 13, 4]),
        ([5, 0, 2], 30, [5, 0, 2]),
        ([100, 1, 1], 30, [28, 1, 1]),
        ([9, 9, 9], 2, [1, 1, 0]),
        ([0, 0, 0], 5, [0, 0, 0]),
    ],
)
def test_equal_quotas_and_what_is_left_goes_on(available, budget, expected):
    assert quotas(available, budget) == expected


def test_the_most_important_tokens_of_every_modality():
    importance = torch.tensor([9.0, 1, 5, 0, 3, 2, 0, 4, 8])
    kinds = torch.tensor([VISION] * 4 + [PROMPT] * 3 + [ANSWER] * 2)
    assert choose_tokens(importance, kinds, 6).tolist() == [True, False, True, False, True, True, False, True, True]
    assert choose_tokens(importance, kinds, 3).tolist() == [True, False, False, False, True, False, False, False, True]
    assert choose_tokens(importance, kinds, 99).sum() == 7


def test_weights_are_the_importance_within_the_set():
    gradients = [torch.tensor([[4.0, 1], [2, 6]]), torch.tensor([[3.0, 8, 5]])]
    kinds = [torch.tensor([[VISION, VISION], [PROMPT, PROMPT]]), torch.tensor([[VISION, ANSWER, ANSWER]])]
    weights = token_weights(gradients, kinds, 3)
    expected = torch.tensor([4.0, 0, 0, 6, 0, 8, 0])
    got = torch.cat([w.reshape(-1) for w in weights.weights])
    torch.testing.assert_close(got, expected / expected.mean())
    squared = torch.cat([w.reshape(-1) for w in token_weights(gradients, kinds, 3, 2).weights])
    torch.testing.assert_close(squared, expected**2 / (expected**2).mean())


@pytest.mark.parametrize("base", ["rtn", "gptq"])
def test_pipeline_weighs_tokens_and_beats_rounding(tiny_model, data_file, tmp_path, base):
    settings = {"bits": 3, "group_size": -1, "samples": 16, "device": "cpu"}
    errors = {}
    for name, recipe in (
        ("rtn", make_recipe(method="rtn", **settings)),
        ("tlq", make_recipe(method="tlq", base=base, token_budget=100, **settings)),
    ):
        errors[name] = calibrate(tiny_model, tmp_path / name, data_file, recipe).layers[-1].errors["all"]
    assert errors["tlq"] < errors["rtn"]
    with (tmp_path / "tlq" / "vlmq" / "layers.csv").open() as handle:
        rows = [row for row in csv.DictReader(handle) if row["module"] != "layer"]
    assert all(row["uniform_importance"] == "False" for row in rows)
    assert all(float(row["importance_answer"]) >= 0 for row in rows)
    config = json.loads((tmp_path / "tlq" / "config.json").read_text())["quantization_config"]
    assert config["method"] == "tlq"


def test_exposure_is_the_default_of_tlq_only():
    assert make_recipe(method="tlq").searches_exposed
    assert not make_recipe(method="tlq", exposed=False).searches_exposed
    assert not make_recipe(method="awq").searches_exposed
    with pytest.raises(VLMQError, match="token_budget"):
        make_recipe(method="tlq", token_budget=0)
