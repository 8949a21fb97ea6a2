"""Statistics of token weights against values known beforehand, and on a calibration of the tiny model."""

import math
from pathlib import Path

import pytest
import torch

from benchmarks.quality.token_statistics import (
    modalities_of_heaviest,
    rank_correlation,
    ranks,
    share_of_heaviest,
    spread,
)
from benchmarks.quality.token_weights import Row, measure
from vlmq_serve.calibrate.pipeline import calibrate
from vlmq_serve.calibrate.progress import SilentProgress
from vlmq_serve.calibrate.recipe import Recipe, make_recipe
from vlmq_serve.format.errors import VLMQError

pytestmark = pytest.mark.unit
EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
MODEL, DATA = EXAMPLES / "tiny-qwen2vl", EXAMPLES / "data" / "calibration.jsonl"


def test_equal_values_share_their_rank() -> None:
    assert ranks(torch.tensor([5.0, 1.0, 5.0, 7.0])).tolist() == [2.5, 1, 2.5, 4]


def test_rank_correlation() -> None:
    values = torch.randn(50, generator=torch.Generator().manual_seed(0))
    assert rank_correlation(values, values.exp()) == pytest.approx(1)
    assert rank_correlation(values, -values) == pytest.approx(-1)
    # 1 - 6 sum d^2 / (n (n^2 - 1)) without ties: d = 0, 0, 1, 1.
    assert rank_correlation(torch.tensor([1.0, 2, 3, 4]), torch.tensor([1.0, 2, 4, 3])) == pytest.approx(0.8)
    # With a tie, the correlation of 1, 2.5, 2.5, 4 with 1, 2, 3, 4.
    tied = rank_correlation(torch.tensor([1.0, 2, 2, 9]), torch.tensor([1.0, 2, 3, 4]))
    assert tied == pytest.approx(4.5 / math.sqrt(4.5 * 5))


def test_spread_and_the_heaviest_tenth() -> None:
    weights, modality = torch.ones(20), torch.zeros(20, dtype=torch.uint8)
    assert spread(weights) == 0
    assert share_of_heaviest(weights) == pytest.approx(0.1)
    weights[3], weights[7], modality[7] = 11, 11, 2
    assert share_of_heaviest(weights) == pytest.approx(22 / 40)
    assert modalities_of_heaviest(weights, modality) == {"vision": 0.5, "prompt": 0, "answer": 0.5}
    assert spread(torch.tensor([1.0, 3.0])) == pytest.approx(0.5)


def rows_of(recipe: Recipe) -> list[Row]:
    return list(measure(MODEL, DATA, recipe, SilentProgress()))


@pytest.mark.parametrize("parts", [{}, {"embeddings": "w2g32", "lm_head": "w8"}, {"vision": "w3g32"}])
def test_the_weights_are_those_of_a_calibration(parts: dict[str, str], tmp_path: Path) -> None:
    """The same effective tokens and means as its report; at o the weight is how far a token has moved."""
    recipe = make_recipe(bits=2, group_size=-1, samples=4, device="cpu", **parts)
    found = {(row.layer, row.linear): row for row in rows_of(recipe)}
    report = calibrate(MODEL, tmp_path / "out", DATA, recipe)
    linears = [(layer.index, linear) for layer in report.layers for linear in layer.linears]
    weighted = {(i, x.name.split(".layers.")[1].partition(".")[2]): x for i, x in linears if x.effective_tokens}
    assert set(found) == {key for key, linear in weighted.items() if not linear.uniform_importance}
    assert {layer for layer, _ in found} == {1, 2, 3}
    rounded = 5e-3  # the report has three digits
    for key, row in found.items():
        assert row.effective_tokens == pytest.approx(weighted[key].effective_tokens, rel=rounded)
        assert row.mean_answer == pytest.approx(weighted[key].importance["answer"], rel=rounded)
        assert row.heaviest_vision + row.heaviest_prompt + row.heaviest_answer == pytest.approx(1)
        assert row.error_spread > 0
        if key[1].endswith("o_proj"):
            assert row.drift_correlation > 0.9


def test_a_method_without_weights_is_refused() -> None:
    with pytest.raises(VLMQError, match="weighs no tokens"):
        rows_of(make_recipe(method="gptq", bits=2, group_size=-1))
