"""Random models for measurements: the shapes are those of the real ones, and they are valid models."""

import json
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from benchmarks.serving import checkpoint_sizes, random_model
from benchmarks.serving.random_model import TINY, write_random_model
from benchmarks.serving.sizes import SIZES
from vlmq_serve.calibrate.pipeline import calibrate
from vlmq_serve.calibrate.recipe import make_recipe
from vlmq_serve.format.headers import read_tensor_index

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("size", "parameters"),
    # What the indices of the Hub's Qwen2-VL-2B-Instruct and 7B-Instruct say in bytes, halved.
    [("2b", 4_417_971_200 // 2), ("7b", 16_582_751_232 // 2)],
)
def test_sizes_have_the_parameters_of_the_real_models(size: str, parameters: int, tmp_path: Path) -> None:
    config = SIZES[size].config(json.loads((TINY / "config.json").read_text()))
    (tmp_path / "config.json").write_text(json.dumps(config))
    with torch.device("meta"):
        model = transformers.Qwen2VLForConditionalGeneration(transformers.AutoConfig.from_pretrained(tmp_path))
    model.tie_weights()
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


def test_a_random_model_is_whole_and_the_same_every_time(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_random_model(tmp_path / name, SIZES["mini"])
    tensors = read_tensor_index(tmp_path / "a")
    model = transformers.Qwen2VLForConditionalGeneration.from_pretrained(tmp_path / "a", dtype=torch.bfloat16)
    assert {*tensors} == {name for name in model.state_dict() if name != "lm_head.weight"}
    for path in {info.file for info in tensors.values()}:
        first, second = load_file(path), load_file(tmp_path / "b" / path.name)
        assert all(torch.equal(first[key], second[key]) for key in first)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "a")
    assert all(tokenizer.decode([index]) for index in range(SIZES["mini"].vocabulary))


def test_sizes_from_shapes_are_those_of_the_files(tmp_path: Path) -> None:
    write_random_model(tmp_path / "source", SIZES["mini"])
    rows = {row["variant"]: row for row in checkpoint_sizes.sizes("mini")}
    assert rows["bf16"]["bytes"] == weights(tmp_path / "source")
    for name, bits, parts in (checkpoint_sizes.VARIANTS[1], checkpoint_sizes.VARIANTS[-1]):
        recipe = make_recipe(method="rtn", bits=bits, group_size=128, **parts)
        calibrate(tmp_path / "source", tmp_path / name, None, recipe)
        assert rows[name]["bytes"] == weights(tmp_path / name)
    assert rows["w2-all"]["times_smaller"] > rows["w2"]["times_smaller"] > 1


def weights(folder: Path) -> int:
    return sum(info.nbytes for info in read_tensor_index(folder).values())


def test_what_cannot_be_rounded_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["random_model", str(tmp_path), "--size", "mini", "--bits", "5"])
    with pytest.raises(SystemExit) as ended:
        random_model.main()
    assert ended.value.code == 1
    assert "error: bits: got 5, allowed" in capsys.readouterr().err
