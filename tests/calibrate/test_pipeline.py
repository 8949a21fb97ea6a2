import csv
import json
import math
from pathlib import Path

import pytest
import torch

from vlmq_serve.calibrate import layer as layer_module
from vlmq_serve.calibrate import pipeline
from vlmq_serve.calibrate.pipeline import calibrate
from vlmq_serve.calibrate.recipe import make_recipe
from vlmq_serve.calibrate.work import partial_folder
from vlmq_serve.evaluate.loading import load_model
from vlmq_serve.format.errors import VLMQError
from vlmq_serve.format.headers import read_tensor_index
from vlmq_serve.format.shards import read_tensors


def recipe(**settings):
    return make_recipe(**{"bits": 3, "group_size": 32, "samples": 24, "device": "cpu", **settings})


def layer_rows(out: Path) -> list[dict[str, str]]:
    with (out / "vlmq" / "layers.csv").open() as handle:
        return list(csv.DictReader(handle))


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return read_tensors(folder, list(read_tensor_index(folder)))


@pytest.mark.parametrize("method", ["rtn", "gptq", "gptaq", "vlmq"])
def test_run_writes_checkpoint_and_report(tiny_model, data_file, tmp_path, method):
    out = tmp_path / "out"
    report = calibrate(tiny_model, out, data_file, recipe(method=method))
    assert len(report.layers) == 3
    rows = layer_rows(out)
    assert len(rows) == 3 * 8
    for row in rows:
        for modality in ("vision", "prompt", "answer", "all"):
            assert 0 < float(row[f"error_{modality}"]) < 1
    run = json.loads((out / "vlmq" / "run.json").read_text())
    assert run["method"] == method
    assert run["data"]["tokens"]["vision"] == 12 * 16 + 12 * 8
    assert run["bytes_after"] < run["bytes_before"]
    actual = sum(info.nbytes for info in read_tensor_index(out).values())
    assert run["bytes_after"] == actual
    assert not partial_folder(out).exists()
    assert load_model(out) is not None


def test_gptq_beats_rounding_and_vlmq_weights_tokens(tiny_model, data_file, tmp_path):
    errors = {}
    for method in ("rtn", "gptq", "gptaq", "vlmq"):
        report = calibrate(tiny_model, tmp_path / method, data_file, recipe(method=method))
        errors[method] = report.layers[-1].errors["all"]
    assert errors["gptq"] < 0.8 * errors["rtn"]
    assert errors["gptaq"] < 0.8 * errors["rtn"]
    assert errors["vlmq"] < 0.8 * errors["rtn"]
    rows = [row for row in layer_rows(tmp_path / "vlmq") if row["module"].endswith("q_proj")]
    assert [row["uniform_importance"] for row in rows] == ["True", "False", "False"]
    assert all(float(row["importance_vision"]) == 1 for row in rows[:1])
    assert all(abs(float(row["importance_answer"]) - 1) > 0.01 for row in rows[1:])


def test_codes_are_those_of_the_solver(tiny_model, data_file, tmp_path):
    """What is stored dequantizes to what the calibration ran with: its reported weight error is met exactly."""
    out = tmp_path / "out"
    report = calibrate(tiny_model, out, data_file, recipe(method="vlmq"))
    served = load_model(out, torch.float32).state_dict()
    source = load_model(tiny_model, torch.float32).state_dict()
    for layer in report.layers:
        for linear in layer.linears:
            key = linear.name.replace("model.layers", "model.language_model.layers") + ".weight"
            error = (served[key] - source[key]).square().sum() / source[key].square().sum()
            assert math.isclose(float(error), linear.weight_error, rel_tol=1e-4)


def test_rtn_without_data_equals_rtn_with_data(tiny_model, data_file, tmp_path):
    calibrate(tiny_model, tmp_path / "a", None, recipe(method="rtn"))
    calibrate(tiny_model, tmp_path / "b", data_file, recipe(method="rtn"))
    first, second = tensors_of(tmp_path / "a"), tensors_of(tmp_path / "b")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_interrupted_run_resumes_to_the_same_checkpoint(tiny_model, data_file, tmp_path, interrupted_at):
    settings = recipe(method="vlmq", save_saliency=2)
    calibrate(tiny_model, tmp_path / "whole", data_file, settings)
    out = tmp_path / "out"
    with interrupted_at(layer_module, "measure_importance", 3):
        calibrate(tiny_model, out, data_file, settings)
    assert not out.exists()
    with pytest.raises(VLMQError, match="interrupted run"):
        calibrate(tiny_model, out, data_file, settings)
    with pytest.raises(VLMQError, match=r"recipe.percdamp was 0.01, is now 0.02"):
        calibrate(tiny_model, out, data_file, recipe(method="vlmq", save_saliency=2, percdamp=0.02), resume=True)
    report = calibrate(tiny_model, out, data_file, settings, resume=True)
    assert any("resumed after 2 of 3 layers" in note for note in report.notes)
    first, second = tensors_of(tmp_path / "whole"), tensors_of(out)
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert (out / "vlmq" / "saliency.safetensors").read_bytes() == (
        tmp_path / "whole" / "vlmq" / "saliency.safetensors"
    ).read_bytes()


def test_after_an_interruption_only_the_own_work_folder_is_named(tiny_model, data_file, tmp_path, interrupted_at):
    from typer.testing import CliRunner

    from vlmq_serve.cli import app

    given = ["-o", tmp_path / "out", "--data", data_file, "--samples", 8, "--group-size", 32]
    arguments = [*map(str, ["calibrate", tiny_model, *given])]

    def stopped_in(module, name, *more):
        with interrupted_at(module, name, 1):
            result = CliRunner().invoke(app, [*arguments, *more], env={"COLUMNS": "200"})
            assert result.exit_code == 130
            raise KeyboardInterrupt
        return result.stderr.splitlines()[-1]

    assert stopped_in(pipeline, "capture_streams") == "interrupted"
    hint = f"interrupted; {tmp_path / 'out.partial'} keeps the finished layers, the same command with --resume goes on"
    assert stopped_in(pipeline, "quantize_layer") == hint
    assert stopped_in(pipeline, "capture_streams", "--resume") == hint
    # Of the same command without --resume, of other settings, and where that is not known yet.
    assert stopped_in(pipeline, "capture_streams", "--overwrite") == hint
    assert stopped_in(pipeline, "capture_streams", "--overwrite", "--bits", "3") == "interrupted"
    assert stopped_in(pipeline, "hash_weights") == "interrupted"


@pytest.mark.parametrize("suffix", ["safetensors", "changed.safetensors"])
def test_a_layer_that_a_crash_has_cut_off_is_done_again(tiny_model, data_file, tmp_path, interrupted_at, suffix):
    out, settings = tmp_path / "out", recipe(method="vlmq")
    calibrate(tiny_model, tmp_path / "whole", data_file, settings)
    with interrupted_at(layer_module, "measure_importance", 3):
        calibrate(tiny_model, out, data_file, settings)
    (partial_folder(out) / f"layer-001.{suffix}").write_bytes(b"")
    report = calibrate(tiny_model, out, data_file, settings, resume=True)
    assert any("resumed after 1 of 3 layers" in note for note in report.notes)
    first, second = tensors_of(tmp_path / "whole"), tensors_of(out)
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_a_work_folder_without_a_state_is_named(tiny_model, data_file, tmp_path):
    partial_folder(tmp_path / "out").mkdir()
    with pytest.raises(VLMQError, match=r"out\.partial: holds no state\.json"):
        calibrate(tiny_model, tmp_path / "out", data_file, recipe(), resume=True)


def test_a_place_that_is_no_folder_is_refused_at_once(tiny_model, data_file, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(VLMQError, match=r"file is no folder that you may write to"):
        calibrate(tiny_model, tmp_path / "file" / "out", data_file, recipe())


def test_mixed_widths_and_ignored_linears(tiny_model, data_file, tmp_path):
    settings = recipe(overrides={"down_proj": "w4g32s"}, ignore=("visual", "lm_head", "layers.1"))
    report = calibrate(tiny_model, tmp_path / "out", data_file, settings)
    schemes = {linear.name: linear.scheme for layer in report.layers for linear in layer.linears}
    assert schemes["model.layers.0.mlp.down_proj"] == "w4g32s"
    assert schemes["model.layers.2.self_attn.q_proj"] == "w3g32"
    assert not any("layers.1." in name for name in schemes)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"group_size": 128}, "does not divide"),
        ({"overrides": {"q_proj": "w2g32"}}, "fuses"),
        ({"overrides": {"dwn_proj": "w2g32"}}, "fits no linear that is quantized"),
        ({"ignore": ("visual", "layer.0")}, "fits no module"),
        ({"ignore": ("visual", "layers")}, "no decoder linear to quantize"),
        ({"max_tokens": 5}, "all 24 samples are longer"),
    ],
)
def test_bad_recipe_leaves_nothing(tiny_model, data_file, tmp_path, settings, message):
    with pytest.raises(VLMQError, match=message):
        calibrate(tiny_model, tmp_path / "out", data_file, recipe(**settings))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_no_checkpoint_is_never_touched(tiny_model, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("x")
    with pytest.raises(VLMQError, match="exists already"):
        calibrate(tiny_model, out, None, recipe(method="rtn"))
    with pytest.raises(VLMQError, match="not written by vlmq"):
        calibrate(tiny_model, out, None, recipe(method="rtn"), overwrite=True)
    assert (out / "mine.txt").exists()


def test_an_earlier_checkpoint_is_replaced_on_request(tiny_model, tmp_path):
    out = tmp_path / "out"
    calibrate(tiny_model, out, None, recipe(method="rtn"))
    (out / "mine.txt").write_text("x")
    with pytest.raises(VLMQError, match="exists already"):
        calibrate(tiny_model, out, None, recipe(method="rtn"))
    assert (out / "mine.txt").exists()
    calibrate(tiny_model, out, None, recipe(method="rtn"), overwrite=True)
    assert not (out / "mine.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_output_in_the_source_is_refused(tiny_model):
    with pytest.raises(VLMQError, match="lies in the source"):
        calibrate(tiny_model, tiny_model / "out", None, recipe(method="rtn"))
    assert not (tiny_model / "out").exists()


def test_broken_image_leaves_nothing(tiny_model, data_file, tmp_path):
    line = json.loads(data_file.read_text().splitlines()[1])
    line["messages"][0]["content"][0] = {"type": "image", "image": "cut.png"}
    (tmp_path / "chats.jsonl").write_text(json.dumps(line))
    (tmp_path / "cut.png").write_bytes((data_file.parent / "1.png").read_bytes()[:100])
    with pytest.raises(VLMQError, match=r"line 1: image 'cut.png' is broken"):
        calibrate(tiny_model, tmp_path / "out", tmp_path / "chats.jsonl", recipe(samples=1))
    assert {path.name for path in tmp_path.iterdir()} == {"chats.jsonl", "cut.png"}


def test_bfloat16_activations(tiny_model, data_file, tmp_path):
    settings = recipe(method="vlmq", dtype="bfloat16", samples=4)
    report = calibrate(tiny_model, tmp_path / "out", data_file, settings)
    assert report.details["dtype"] == "bfloat16"
    assert all(0 < layer.errors["all"] < 1 for layer in report.layers)


def test_method_that_needs_data_says_so(tiny_model, tmp_path):
    with pytest.raises(VLMQError, match="needs a data file"):
        calibrate(tiny_model, tmp_path / "out", None, recipe(method="vlmq"))
