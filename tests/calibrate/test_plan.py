import json
import shutil
import subprocess
import sys

import pytest
from safetensors.torch import load_file, save_file

from vlmq_serve.calibrate import pipeline
from vlmq_serve.calibrate.memory_estimate import estimate_bytes
from vlmq_serve.calibrate.pipeline import calibrate
from vlmq_serve.calibrate.planning import make_plan
from vlmq_serve.calibrate.recipe import make_recipe
from vlmq_serve.format.config import QuantizationSpec
from vlmq_serve.format.consistency import config_problems
from vlmq_serve.format.errors import VLMQError
from vlmq_serve.format.headers import read_json, read_tensor_index


def test_plan_lists_linears_and_touches_nothing(tiny_model):
    before = {path: path.stat().st_mtime_ns for path in tiny_model.rglob("*")}
    plan = make_plan(tiny_model, make_recipe(bits=3, group_size=32))
    assert plan.layers == 3
    assert len(plan.quantized) == 3 * 7
    assert plan.linears[0].shape == (64, 64)
    assert plan.linears[0].bytes_after == 64 * 6 * 4 + 64 * 2 * 2 + 64 * 2
    assert plan.bytes_after < plan.bytes_before
    assert estimate_bytes(plan, with_data=True) > estimate_bytes(plan, with_data=False) > 0
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


@pytest.mark.parametrize(
    ("gone", "message"),
    [
        ("preprocessor_config.json", "image processor: found none"),
        ("tokenizer.json", "tokenizer: found none"),
        ("chat_template.jinja", "chat template: found none"),
    ],
)
def test_what_reads_the_chats_is_missed_by_the_plan(tiny_model, tmp_path, gone, message):
    """Rounding without data needs none of it."""
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    for name in {gone, *(["processor_config.json"] if gone.startswith("pre") else [])}:
        (folder / name).unlink(missing_ok=True)
    with pytest.raises(VLMQError, match=message):
        make_plan(folder, make_recipe(method="gptq", group_size=32))
    make_plan(folder, make_recipe(method="rtn", group_size=32))


def test_a_broken_processor_is_found_before_the_model_is_loaded(tiny_model, data_file, tmp_path, monkeypatch):
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    for name in ("preprocessor_config.json", "processor_config.json"):
        (folder / name).write_text("not JSON")
    monkeypatch.setattr(pipeline, "load_model", lambda *_: pytest.fail("the model was loaded"))
    with pytest.raises(VLMQError, match="cannot load the processor"):
        calibrate(folder, tmp_path / "out", data_file, make_recipe(method="gptq", group_size=32, device="cpu"))


def test_a_tower_that_feeds_several_layers_is_not_simulated(tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "qwen3_vl"}
    (folder / "config.json").write_text(json.dumps(config))
    recipe = make_recipe(method="qvlm", group_size=32, activation_bits=4, simulated_vision=True)
    with pytest.raises(VLMQError, match="simulated_vision: got model_type 'qwen3_vl'"):
        make_plan(folder, recipe)


def test_sources_of_mixed_dtypes_get_scales_of_one(tiny_model, tmp_path, data_file):
    """Fine-tuned models hold some layers, or the vision tower, in fp32; vLLM allocates all scales alike."""
    source = shutil.copytree(tiny_model, tmp_path / "source")
    (shard,) = source.glob("*.safetensors")
    tensors = {k: v.float() if "visual.blocks.0." in k or ".layers.1." in k else v for k, v in load_file(shard).items()}
    save_file(tensors, shard, {"format": "pt"})
    recipe = make_recipe(method="gptq", bits=4, group_size=32, vision="w8g32", samples=4)
    calibrate(source, tmp_path / "out", data_file, recipe)
    tensors, config = read_tensor_index(tmp_path / "out"), read_json(tmp_path / "out" / "config.json")
    assert {info.dtype for name, info in tensors.items() if name.endswith(".scales")} == {"BF16"}
    assert config_problems(tensors, QuantizationSpec.from_dict(config["quantization_config"]), config) == []


MEASURE = """
import sys
from vlmq_serve.calibrate.pipeline import calibrate
from vlmq_serve.calibrate.recipe import make_recipe
from vlmq_serve.calibrate.resident import peak_resident_mib
settings = dict(entry.split("=") for entry in sys.argv[3:])
calibrate(sys.argv[1], sys.argv[2], None, make_recipe(method="rtn", group_size=32, **settings))
print(peak_resident_mib())
"""


@pytest.mark.parametrize("parts", [{}, {"lm_head": "w8"}, {"lm_head": "w4", "embeddings": "w8"}])
def test_rounding_without_data_takes_about_what_the_plan_says(tiny_model, tmp_path, parts):
    """A table of 1.2 million words beside a decoder of 64: 150 MiB where the largest decoder linear has 12 KiB."""
    source = shutil.copytree(tiny_model, tmp_path / "model")
    (shard,) = source.glob("*.safetensors")
    tensors = load_file(shard)
    table = next(name for name in tensors if name.endswith("embed_tokens.weight"))
    save_file(tensors | {table: tensors[table].repeat(3000, 1)}, shard, {"format": "pt"})
    given = [source, tmp_path / "out", *(f"{part}={scheme}" for part, scheme in parts.items())]
    measured = subprocess.run([sys.executable, "-c", MEASURE, *map(str, given)], capture_output=True, check=True)
    estimate = estimate_bytes(make_plan(source, make_recipe(method="rtn", group_size=32, **parts)), with_data=False)
    assert estimate / 2**20 == pytest.approx(float(measured.stdout), rel=0.25)
