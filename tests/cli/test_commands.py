"""The commands on the shipped model: what they print, their exit status, and that bad input leaves nothing behind."""

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from vlmq_serve.cli import app

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "examples" / "tiny-qwen2vl"
CALIBRATION = ROOT / "examples" / "data" / "calibration.jsonl"
EVALUATION = ROOT / "examples" / "data" / "evaluation.jsonl"


def vlmq(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})


@pytest.fixture(scope="module")
def rtn_w4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cli") / "w4"
    result = vlmq("calibrate", MODEL, "-o", out, "--method", "rtn", "--bits", 4, "--group-size", 64)
    assert result.exit_code == 0, result.output
    return out


def copy_of(checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "damaged"))


def one_error(result: Result) -> str:
    """The single error line of a failed command."""
    assert result.exit_code == 1, result.output
    assert "Traceback" not in result.output
    lines = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert len(lines) == 1, result.stderr
    return lines[0]


def test_help_of_every_command_has_an_example() -> None:
    for command in ("calibrate", "inspect", "eval"):
        result = vlmq(command, "--help")
        assert result.exit_code == 0
        assert f"Example: vlmq {command}" in result.output


def test_dry_run_prints_the_plan_and_writes_nothing(tmp_path: Path) -> None:
    result = vlmq(
        "calibrate", MODEL, "-o", tmp_path / "out", "--data", CALIBRATION, "--bits", 3, "--group-size", 64, "--dry-run"
    )
    assert result.exit_code == 0, result.output
    assert "w3g64" in result.output
    assert "qwen2_vl" in result.output
    assert list(tmp_path.iterdir()) == []


def test_inspect_shows_schemes_sizes_and_provenance(rtn_w4: Path) -> None:
    result = vlmq("inspect", rtn_w4)
    assert result.exit_code == 0, result.output
    for text in ("q_proj", "w4g64", "lm_head", "rtn", "every quantized tensor is there"):
        assert text in result.output


def test_inspect_names_damage(rtn_w4: Path, tmp_path: Path) -> None:
    damaged = copy_of(rtn_w4, tmp_path)
    config = json.loads((damaged / "config.json").read_text())
    config["quantization_config"]["bits"] = 2
    (damaged / "config.json").write_text(json.dumps(config))
    result = vlmq("inspect", damaged)
    assert result.exit_code == 1
    assert "w2g64" in result.output
    config["quantization_config"]["format_version"] = 7
    (damaged / "config.json").write_text(json.dumps(config))
    assert "format_version: got 7, this vlmq-serve reads 1" in one_error(vlmq("inspect", damaged))
    shard = damaged / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    config["quantization_config"]["format_version"] = 1
    (damaged / "config.json").write_text(json.dumps(config))
    assert "truncated" in one_error(vlmq("inspect", damaged))


def test_eval_writes_answers_and_compares(rtn_w4: Path, tmp_path: Path) -> None:
    first = vlmq("eval", MODEL, "--data", EVALUATION, "--limit", 24, "-o", tmp_path / "bf16.json")
    assert first.exit_code == 0, first.output
    second = vlmq("eval", rtn_w4, "--data", EVALUATION, "--limit", 24, "--reference", tmp_path / "bf16.json")
    assert second.exit_code == 0, second.output
    assert "same answer" in second.output
    written = json.loads((tmp_path / "bf16.json").read_text())
    assert len(written["answers"]) == 24
    assert written["accuracy"] > 0.5
    fewer = vlmq("eval", rtn_w4, "--data", EVALUATION, "--limit", 4, "-o", tmp_path / "w4.json",
                 "--reference", tmp_path / "bf16.json")  # fmt: skip
    assert "was asked other questions" in one_error(fewer)
    assert "evaluate" not in fewer.stdout  # before a model is loaded
    assert not (tmp_path / "w4.json").exists()
    lost = vlmq("eval", MODEL.parent / "nowhere", "--data", tmp_path / "nowhere.jsonl")
    assert "nowhere.jsonl: cannot be read" in one_error(lost)
    assert "cannot be written" in one_error(vlmq("eval", rtn_w4, "--data", EVALUATION, "-o", tmp_path))
    again = ("eval", MODEL, "--data", EVALUATION, "--limit", 2, "-o", tmp_path / "bf16.json")
    assert "exists already" in one_error(vlmq(*again))
    assert len(json.loads((tmp_path / "bf16.json").read_text())["answers"]) == 24
    assert vlmq(*again, "--overwrite").exit_code == 0
    assert len(json.loads((tmp_path / "bf16.json").read_text())["answers"]) == 2


def test_eval_finds_a_broken_data_file_before_it_loads_the_model(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("vlmq_serve.evaluate.loading.load_model", lambda *_: pytest.fail("the model was loaded"))
    assert "cannot be read" in one_error(vlmq("eval", MODEL, "--data", tmp_path / "none.jsonl"))
    damaged = copy_of(MODEL, tmp_path)
    for name in ("preprocessor_config.json", "processor_config.json"):
        (damaged / name).write_text("not JSON")
    assert "cannot load the processor" in one_error(vlmq("eval", damaged, "--data", EVALUATION))


def test_eval_in_another_dtype_is_recorded_and_said(rtn_w4: Path, tmp_path: Path) -> None:
    given = ("--data", EVALUATION, "--limit", 24, "--device", "cpu")
    files = {dtype: tmp_path / f"{dtype}.json" for dtype in ("auto", "bfloat16")}
    for dtype, file in files.items():
        result = vlmq("eval", rtn_w4, *given, "--dtype", dtype, "-o", file)
        assert result.exit_code == 0, result.output
        assert f"in transformers, {'fp32' if dtype == 'auto' else 'bf16'} on cpu" in result.output
    auto, bf16 = (json.loads(file.read_text()) for file in files.values())
    assert (auto["device"], auto["dtype"]) == ("cpu", "float32")
    assert (bf16["device"], bf16["dtype"]) == ("cpu", "bfloat16")
    assert bf16["accuracy"] == pytest.approx(auto["accuracy"], abs=0.1)
    compared = vlmq("eval", rtn_w4, *given, "--dtype", "bfloat16", "--reference", files["auto"])
    assert f"{rtn_w4} was computed in bfloat16, {rtn_w4} in float32: rounding is part" in compared.output
    same = vlmq("eval", rtn_w4, *given, "--dtype", "bfloat16", "--reference", files["bfloat16"])
    assert "was computed in" not in same.output
    del auto["dtype"], auto["device"]  # as written before they were recorded
    files["auto"].write_text(json.dumps(auto))
    old = vlmq("eval", rtn_w4, *given, "--reference", files["auto"])
    assert "in a dtype that is not recorded: rounding is part" in old.output


def test_eval_refuses_places_that_do_not_exist(rtn_w4: Path) -> None:
    place = (rtn_w4, "--data", EVALUATION)
    assert "device: got 'gpu', allowed" in one_error(vlmq("eval", *place, "--device", "gpu"))
    assert "dtype: got 'int8', allowed" in one_error(vlmq("eval", *place, "--dtype", "int8"))
    url = ("http://127.0.0.1:9/v1", "--data", EVALUATION)
    assert "--dtype: got 'float16' for a URL" in one_error(vlmq("eval", *url, "--dtype", "float16"))
    assert "--device: got 'cpu' for a URL" in one_error(vlmq("eval", *url, "--device", "cpu"))
    assert "--simulate: got a URL" in one_error(vlmq("eval", *url, "--simulate"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--bits", "5"], "bits: got 5, allowed"),
        (["--group-size", "128"], "use one of"),
        (["--method", "magic"], "method: got 'magic'"),
        ([], "method 'vlmq' needs chats with images"),
    ],
)
def test_bad_calibration_settings(options: list[str], message: str, tmp_path: Path) -> None:
    data = [] if not options else ["--data", CALIBRATION]
    assert message in one_error(vlmq("calibrate", MODEL, "-o", tmp_path / "out", *data, *options))
    assert list(tmp_path.iterdir()) == []


def test_a_data_file_with_a_broken_image(tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n but no image")
    parts = [{"type": "image", "image": "broken.png"}, {"type": "text", "text": "What colour?"}]
    chat = {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "red"}]}
    data = tmp_path / "data.jsonl"
    data.write_text(CALIBRATION.read_text().splitlines()[0] + "\n" + json.dumps(chat) + "\n")
    result = vlmq("calibrate", MODEL, "-o", tmp_path / "out", "--data", data, "--group-size", 64)
    error = one_error(result)
    assert "line 2" in error
    assert "broken.png" in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken.png", "data.jsonl"]


def test_an_unsupported_model(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"model_type": "mamba"}))
    error = one_error(vlmq("calibrate", model, "-o", tmp_path / "out", "--data", CALIBRATION))
    assert "model_type 'mamba', supported: qwen2_vl" in error
    assert not (tmp_path / "out").exists()


def test_an_existing_output_is_never_touched(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("kept")
    error = one_error(vlmq("calibrate", MODEL, "-o", tmp_path / "out", "--method", "rtn", "--group-size", 64))
    assert "exists already" in error
    assert (tmp_path / "out" / "precious").read_text() == "kept"
