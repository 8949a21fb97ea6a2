"""A dequantized checkpoint answers under the same rules as its source."""

import json
import shutil
from pathlib import Path

from vlmq_serve.calibrate.pipeline import calibrate
from vlmq_serve.calibrate.recipe import make_recipe
from vlmq_serve.evaluate.loading import load_model

TINY = Path(__file__).resolve().parents[2] / "examples" / "tiny-qwen2vl"


def test_generation_settings_are_those_of_the_source(tmp_path):
    """Qwen2.5-VL's ask for a repetition penalty and have two end tokens: without them answers are not comparable."""
    source = shutil.copytree(TINY, tmp_path / "source")
    settings = {"eos_token_id": [2, 0], "pad_token_id": 0, "repetition_penalty": 1.05}
    (source / "generation_config.json").write_text(json.dumps(settings))
    calibrate(source, tmp_path / "out", None, make_recipe(method="rtn", bits=4, group_size=64))
    plain, quantized = (load_model(folder).generation_config for folder in (source, tmp_path / "out"))
    for key, value in settings.items():
        assert getattr(plain, key) == getattr(quantized, key) == value
