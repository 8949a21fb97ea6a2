import pytest
import torch
from safetensors.torch import load_file

from vlmq_serve.calibrate.pipeline import calibrate
from vlmq_serve.calibrate.recipe import make_recipe
from vlmq_serve.calibrate.saliency import saliency_map
from vlmq_serve.calibrate.samples import VISION
from vlmq_serve.format.errors import VLMQError


def test_map_has_the_image_layout():
    weights = torch.arange(12.0)
    assert torch.equal(saliency_map(weights, (1, 6, 8), 2), weights.reshape(3, 4))
    assert torch.equal(saliency_map(torch.cat([weights, weights + 2]), (2, 6, 8), 2), weights.reshape(3, 4) + 1)


def test_map_of_the_wrong_tokens_is_an_error():
    with pytest.raises(VLMQError, match="got 11 weights for a grid of 1 x 3 x 4"):
        saliency_map(torch.arange(11.0), (1, 6, 8), 2)


def test_run_keeps_the_first_samples(tiny_model, data_file, tmp_path):
    recipe = make_recipe(bits=3, group_size=32, samples=8, device="cpu", save_saliency=2)
    report = calibrate(tiny_model, tmp_path / "out", data_file, recipe)
    kept = load_file(tmp_path / "out" / "vlmq" / "saliency.safetensors")
    assert set(report.details["saliency"]["samples"]) == {"0", "1"}
    for index in (0, 1):
        importance, modality = kept[f"sample.{index}.importance"], kept[f"sample.{index}.modality"]
        assert importance.shape == (3, 4, len(modality))
        assert (importance[0] == 1).all()  # both paths are equal before the first quantized layer
        grid = kept[f"sample.{index}.image_grid_thw"][0]
        picture = saliency_map(importance[1, 0][modality == VISION], grid, 2)
        assert picture.shape == (int(grid[1]) // 2, int(grid[2]) // 2)
        assert picture.min() >= 0
