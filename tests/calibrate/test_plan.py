import json
import shutil

import pytest

from vlmq_serve.calibrate.planning import make_plan
from vlmq_serve.calibrate.recipe import make_recipe
from vlmq_serve.format.errors import VLMQError


def test_plan_lists_linears_and_touches_nothing(tiny_model):
    before = {path: path.stat().st_mtime_ns for path in tiny_model.rglob("*")}
    plan = make_plan(tiny_model, make_recipe(bits=3, group_size=32))
    assert plan.layers == 3
    assert len(plan.quantized) == 3 * 7
    assert plan.linears[0].shape == (64, 64)
    assert plan.linears[0].bytes_after == 64 * 6 * 4 + 64 * 2 * 2 + 64 * 2
    assert plan.bytes_after < plan.bytes_before
    assert plan.estimated_bytes > 0
    assert {path: path.stat().st_mtime_ns for path in tiny_model.rglob("*")} == before


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "llava"}, "got model_type 'llava', supported: qwen2_vl"),
        ({"quantization_config": {"quant_method": "vlmq"}}, "is quantized already"),
    ],
)
def test_models_that_cannot_be_calibrated(tiny_model, tmp_path, config, message):
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    merged = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(merged))
    with pytest.raises(VLMQError, match=message):
        make_plan(folder, make_recipe(bits=3, group_size=32))


def test_model_that_is_not_there(tmp_path):
    with pytest.raises(VLMQError, match="which is no folder"):
        make_plan(tmp_path / "none", make_recipe())
