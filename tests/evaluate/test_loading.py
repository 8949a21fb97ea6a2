"""A dequantized checkpoint answers under the same rules as its source."""

import json
import os
import shutil
from pathlib import Path

import pytest

from vlmq_serve.calibrate.pipeline import calibrate
from vlmq_serve.calibrate.recipe import make_recipe
from vlmq_serve.evaluate.loading import load_model
from vlmq_serve.evaluate.run import evaluate_chats, read_evaluation
from vlmq_serve.evaluate.simulation import load_simulated
from vlmq_serve.export.compressed_tensors import export_compressed_tensors
from vlmq_serve.format.errors import VLMQError
from vlmq_serve.verify.finding import Level
from vlmq_serve.verify.run import verify

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


def _cut(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def _text_only(folder):
    text = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "vocab_size": 8, "hidden_size": 8}
    (folder / "config.json").write_text(json.dumps(text))


@pytest.mark.parametrize(("change", "cause"), [(_cut, "header"), (_text_only, "Qwen2Config")])
def test_a_dense_model_that_cannot_be_read_is_one_error(tmp_path, change, cause):
    """Calibration has checked the files by then; evaluation takes any folder."""
    folder = Path(shutil.copytree(TINY, tmp_path / "model"))
    change(folder)
    with pytest.raises(VLMQError, match=f"model: transformers cannot load the model .*({cause})") as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)


def test_paths_may_be_strings_everywhere(tmp_path):
    """What a notebook calls: each of these has failed with an attribute that a string lacks."""
    data, out, exported = (os.fspath(tmp_path / name) for name in ("chats.jsonl", "out", "exported"))
    messages = [{"role": "user", "content": "Colour?"}, {"role": "assistant", "content": "red"}]
    Path(data).write_text(json.dumps({"messages": messages}) + "\n")
    recipe = make_recipe(method="gptq", bits=4, group_size=64, samples=1, allow_text_only=True, device="cpu")
    report = calibrate(os.fspath(TINY), out, data, recipe)
    assert report.out == Path(out)
    assert next(verify(out)).level == Level.OK
    assert load_simulated(out).lm_head.weight.equal(load_model(out).lm_head.weight)
    export_compressed_tensors(out, exported)
    assert (Path(exported) / "config.json").is_file()
    result = evaluate_chats("constant", data, lambda chats: iter(["red"] * len(chats)))
    assert result.data == "chats.jsonl"
    (tmp_path / "w4.json").write_text(json.dumps(result.to_json()))
    assert read_evaluation(os.fspath(tmp_path / "w4.json")) == result
