"""VLMQ's options through the whole pipeline: where weights come from, and which linears they reach."""

import csv

import pytest

from vlmq_serve.calibrate.pipeline import calibrate
from vlmq_serve.calibrate.recipe import make_recipe
from vlmq_serve.format.errors import VLMQError


def weighted_rows(tiny_model, data_file, tmp_path, **settings) -> dict[str, dict[str, str]]:
    """Rows of the second layer with token weights, by leaf name."""
    recipe = make_recipe(bits=3, group_size=32, samples=8, device="cpu", **settings)
    calibrate(tiny_model, tmp_path / "out", data_file, recipe)
    with (tmp_path / "out" / "vlmq" / "layers.csv").open() as handle:
        rows = [row for row in csv.DictReader(handle) if row["layer"] == "1" and row["importance_vision"]]
    return {row["module"].rpartition(".")[2]: row for row in rows}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, "q_proj k_proj v_proj o_proj"),
        ({"importance": "attention_heads"}, "q_proj k_proj v_proj"),
        ({"importance": "layer"}, "q_proj k_proj v_proj o_proj"),
        ({"importance": "layer", "weighted": ["mlp", "o_proj"]}, "o_proj gate_proj up_proj down_proj"),
        ({"weighted": ["v_proj"], "exponent": 2, "per_sample": True}, "v_proj"),
        ({"importance": "cross_entropy", "weighted": ["self_attn", "mlp"]},
         "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj"),
    ],
)  # fmt: skip
def test_weights_reach_the_linears_that_were_named(tiny_model, data_file, tmp_path, settings, expected):
    rows = weighted_rows(tiny_model, data_file, tmp_path, **settings)
    assert list(rows) == expected.split()
    assert all(row["uniform_importance"] == "False" for row in rows.values())
    assert all(float(row["importance_answer"]) != 1 for row in rows.values())


def test_cross_entropy_weighs_the_first_layer_too(tiny_model, data_file, tmp_path):
    recipe = make_recipe(bits=3, group_size=32, samples=4, importance="cross_entropy", device="cpu")
    report = calibrate(tiny_model, tmp_path / "out", data_file, recipe)
    assert not any(linear.uniform_importance for linear in report.layers[0].linears)


@pytest.mark.parametrize(
    "settings", [{"weighted": ["down_proj"]}, {"weighted": ["o_proj"], "importance": "attention_heads"}]
)
def test_a_linear_without_gradients_is_one_error(tiny_model, data_file, tmp_path, settings):
    recipe = make_recipe(bits=3, group_size=32, **settings)
    with pytest.raises(VLMQError, match="has no gradient of the attention"):
        calibrate(tiny_model, tmp_path / "out", data_file, recipe)
    assert list(tmp_path.iterdir()) == []
