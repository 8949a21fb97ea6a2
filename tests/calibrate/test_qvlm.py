"""Q-VLM's entropy and partition against direct computations, and its search through the pipeline."""

import json
import math

import pytest
import torch

from vlmq_serve.calibrate.dependency import conditional_entropy, partition, soft_assignment
from vlmq_serve.calibrate.percentiles import PERCENTILES
from vlmq_serve.calibrate.pipeline import calibrate
from vlmq_serve.calibrate.recipe import make_recipe
from vlmq_serve.calibrate.solvers.grid import fit_grid
from vlmq_serve.format.headers import read_tensor_index
from vlmq_serve.format.scheme import Scheme
from vlmq_serve.format.shards import read_tensors


def assign_by_hand(values, levels):
    low, high = min(values), max(values)
    step = (high - low) / (levels - 1)
    rows = []
    for x in values:
        powers = [math.exp(-((x - (low + m * step)) ** 2) / step) for m in range(levels)]
        rows.append([power / sum(powers) for power in powers])
    return rows


def test_entropy_equals_a_direct_computation():
    torch.manual_seed(0)
    first = torch.randn(3, 5)
    second = 0.7 * first + 0.3 * torch.randn(3, 5)
    levels = 6
    a, b = (assign_by_hand(x.reshape(-1).double().tolist(), levels) for x in (first, second))
    torch.testing.assert_close(
        soft_assignment(first.reshape(-1), levels).double(), torch.tensor(a).double(), atol=1e-5, rtol=1e-4
    )
    entropy = 0.0
    for i in range(levels):
        row = [sum(x[i] * y[j] for x, y in zip(a, b, strict=True)) / len(a) for j in range(levels)]
        entropy -= sum(p * math.log(p / sum(row)) for p in row)
    assert conditional_entropy(first, second, levels) == pytest.approx(entropy, rel=1e-5)


def test_what_the_first_layer_tells_lowers_the_entropy():
    """Values far apart and a fine grid: knowing x tells its copy, but not an independent x."""
    torch.manual_seed(0)
    first = torch.randint(0, 16, (4000,)).float() * 100
    other = first[torch.randperm(4000)]
    assert conditional_entropy(first, first) < 0.05
    assert conditional_entropy(first, other) == pytest.approx(math.log(16), rel=0.02)


@pytest.mark.parametrize(
    ("dependencies", "threshold", "expected"),
    [
        ([2.0, 2.0, 2.0, 2.0], 1.0, [3, 2]),
        ([2.0, 0.5, 2.0], 1.0, [3, 1]),  # the sum of two, 2.5, is above 2 h0
        ([0.5, 2.0, 0.5], 1.0, [1, 3]),  # 2.5 above 2 h0 again
        ([1.0, 1.0, 1.0], None, [1, 1, 1, 1]),  # none above the mean
        ([], None, [1]),
    ],
)
def test_partition(dependencies, threshold, expected):
    assert partition(dependencies, threshold) == expected
    assert sum(expected) == len(dependencies) + 1


def test_percentiles_span_quantiles_of_the_group():
    weight = torch.cat([torch.linspace(-1, 1, 101), torch.tensor([9.0])])[None, None, :]
    plain = fit_grid(weight, Scheme(2, -1), torch.float32, "percentile", percentile=1.0)
    cut = fit_grid(weight, Scheme(2, -1), torch.float32, "percentile", percentile=0.98)
    assert float(plain.scales) == pytest.approx(10 / 3)
    low, high = (float(weight.quantile(q)) for q in (0.02, 0.98))
    assert float(cut.scales) == pytest.approx((high - low) / 3)


def qvlm(tiny_model, data_file, out, **settings):
    recipe = make_recipe(method="qvlm", bits=3, group_size=-1, samples=2, device="cpu", **settings)
    return calibrate(tiny_model, out, data_file, recipe)


def test_joint_search_is_no_worse_than_no_clipping(tiny_model, data_file, tmp_path):
    """One block of three layers: the error at its output is what the search minimises over all 125 combinations."""
    searched = qvlm(tiny_model, data_file, tmp_path / "a", dependency_threshold=0.0)
    assert list(searched.details["percentiles"]) == ["0"]
    assert all(p in PERCENTILES for p in searched.details["percentiles"]["0"])
    plain = calibrate(tiny_model, tmp_path / "b", data_file, make_recipe(
        method="rtn", bits=3, group_size=-1, samples=2, device="cpu"))  # fmt: skip
    assert searched.layers[-1].errors["all"] < plain.layers[-1].errors["all"]
    config = json.loads((tmp_path / "a" / "config.json").read_text())["quantization_config"]
    assert config["method"] == "qvlm"


def test_an_interrupted_block_is_searched_again(tiny_model, data_file, tmp_path, interrupted_at):
    from vlmq_serve.calibrate import pipeline

    qvlm(tiny_model, data_file, tmp_path / "whole", dependency_threshold=0.0)
    with interrupted_at(pipeline, "quantize_layer", 2):
        qvlm(tiny_model, data_file, tmp_path / "out", dependency_threshold=0.0)
    recipe = make_recipe(method="qvlm", bits=3, group_size=-1, samples=2, device="cpu", dependency_threshold=0.0)
    calibrate(tiny_model, tmp_path / "out", data_file, recipe, resume=True)
    names = list(read_tensor_index(tmp_path / "whole"))
    first, second = read_tensors(tmp_path / "whole", names), read_tensors(tmp_path / "out", names)
    assert all(torch.equal(first[name], second[name]) for name in names)
