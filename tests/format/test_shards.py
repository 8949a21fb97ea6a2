"""Key-by-key rewriting of a model folder: what changes, what must not, and what happens when it dies."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from vlmq_serve.format.config import QuantizationSpec
from vlmq_serve.format.errors import VLMQError
from vlmq_serve.format.headers import find_problems, read_header, read_tensor_index
from vlmq_serve.format.scheme import Scheme
from vlmq_serve.format.shards import read_tensors, write_checkpoint
from vlmq_serve.format.weight import PackedWeight

LINEARS = ("model.layers.0.self_attn.o_proj", "model.layers.0.mlp.down_proj")
SCHEME = Scheme(3, 32)
SPEC = QuantizationSpec(SCHEME, ignore=("lm_head",), method="rtn", producer="test")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A two-shard model folder with the usual companions."""
    folder = tmp_path / "source"
    (folder / "extra").mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    shards = {
        "model-00001-of-00002.safetensors": {
            f"{LINEARS[0]}.weight": torch.randn(8, 64, generator=generator).bfloat16(),
            f"{LINEARS[0]}.bias": torch.randn(8, generator=generator).bfloat16(),
        },
        "model-00002-of-00002.safetensors": {
            f"{LINEARS[1]}.weight": torch.randn(4, 96, generator=generator).bfloat16(),
            "lm_head.weight": torch.randn(4, 64, generator=generator).bfloat16(),
        },
    }
    weight_map = {}
    for name, tensors in shards.items():
        save_file(tensors, folder / name, {"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, name))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2_vl", "torch_dtype": "bfloat16"}))
    (folder / "tokenizer.json").write_bytes(b'{"odd":  "spacing \xc3\xa4"}\r\n')
    (folder / "extra" / "chat_template.jinja").write_text("{{ x }}")
    (folder / "pytorch_model.bin").write_bytes(b"the same weights again")
    return folder


def quantized() -> dict[str, PackedWeight]:
    generator = torch.Generator().manual_seed(1)
    result = {}
    for name, (rows, cols) in zip(LINEARS, [(8, 64), (4, 96)], strict=True):
        codes = torch.randint(0, 8, (rows, cols), generator=generator)
        scales = torch.rand(rows, cols // 32, generator=generator).bfloat16()
        result[name] = PackedWeight.from_codes(codes, scales, torch.full((rows, cols // 32), 3), SCHEME)
    return result


def test_only_the_quantized_weights_change(source: Path, tmp_path: Path) -> None:
    out, packed = tmp_path / "out", quantized()
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "run.json").write_text("{}")
    write_checkpoint(source, out, packed, SPEC, report=tmp_path / "report")

    before, after = read_tensor_index(source), read_tensor_index(out)
    replaced = {f"{name}.weight" for name in LINEARS}
    assert set(after) == (set(before) - replaced) | {k for n in LINEARS for k in packed[n].tensors(n)}
    for name in set(before) - replaced:
        old, new = read_tensors(source, [name])[name], read_tensors(out, [name])[name]
        assert old.dtype == new.dtype
        assert torch.equal(old.view(torch.int16), new.view(torch.int16))
    for name in LINEARS:
        loaded = read_tensors(out, list(packed[name].tensors(name)))
        assert all(torch.equal(loaded[key], tensor) for key, tensor in packed[name].tensors(name).items())
    for other in ("tokenizer.json", "extra/chat_template.jinja"):
        assert (out / other).read_bytes() == (source / other).read_bytes()
    assert (out / "vlmq" / "run.json").exists()
    assert not (out / "pytorch_model.bin").exists()
    config = json.loads((out / "config.json").read_text())
    spec = QuantizationSpec.from_dict(config["quantization_config"])
    assert config["model_type"] == "qwen2_vl"
    assert spec.scheme == SCHEME
    assert find_problems(after, spec) == []
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(info.nbytes for info in after.values())
    assert not list(tmp_path.glob("*.writing"))


def test_the_weights_may_be_read_by_whoever_may_read_the_config(source: Path, tmp_path: Path) -> None:
    """safetensors 0.8 makes files of mode 0600: a server that is another user could not read them."""
    before = os.umask(0o022)
    try:
        write_checkpoint(source, tmp_path / "out", quantized(), SPEC)
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "out").glob("*.*")}
    assert len(modes) > 3
    assert set(modes.values()) == {0o644}, modes


def test_changed_tensors_take_their_place_in_the_source_s_dtype(source: Path, tmp_path: Path) -> None:
    index = read_tensor_index(source)
    name = next(n for n in index if n not in {f"{linear}.weight" for linear in LINEARS})
    before = read_tensors(source, [name])[name]
    write_checkpoint(source, tmp_path / "out", quantized(), SPEC, changed={name: before.float() * 2})
    after = read_tensors(tmp_path / "out", [name])[name]
    assert after.dtype == before.dtype
    assert torch.equal(after, before * 2)
    for wrong in ({"no.such.weight": before}, {name: before.flatten()[:1]}):
        with pytest.raises(VLMQError, match="changed tensor"):
            write_checkpoint(source, tmp_path / "other", quantized(), SPEC, changed=wrong)
    assert not (tmp_path / "other").exists()


class DyingMapping(Mapping[str, PackedWeight]):
    """Yields the first weight and then fails, as a full disk or a kill would."""

    def __init__(self, packed: Mapping[str, PackedWeight]) -> None:
        self.packed = packed

    def __getitem__(self, name: str) -> PackedWeight:
        if name == LINEARS[1]:
            raise OSError("disk gone")
        return self.packed[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.packed)

    def __len__(self) -> int:
        return len(self.packed)


def test_a_run_that_dies_leaves_nothing_that_looks_finished(source: Path, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="disk gone"):
        write_checkpoint(source, tmp_path / "out", DyingMapping(quantized()), SPEC)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]


def test_leftovers_of_a_killed_run_do_no_harm(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out.writing").mkdir()
    (tmp_path / "out.writing" / "model-00009.safetensors").write_bytes(b"half")
    write_checkpoint(source, tmp_path / "out", quantized(), SPEC)
    assert not (tmp_path / "out" / "model-00009.safetensors").exists()


def test_refusals(source: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(VLMQError, match="exists already"):
        write_checkpoint(source, tmp_path / "taken", quantized(), SPEC)
    with pytest.raises(VLMQError, match=r"no weight for 1 .*first 'nowhere'"):
        write_checkpoint(source, tmp_path / "a", {"nowhere": quantized()[LINEARS[0]]}, SPEC)
    with pytest.raises(VLMQError, match="ignore list"):
        write_checkpoint(source, tmp_path / "a", {"lm_head": quantized()[LINEARS[0]]}, SPEC)
    with pytest.raises(VLMQError, match="source shape"):
        write_checkpoint(source, tmp_path / "a", {LINEARS[1]: quantized()[LINEARS[0]]}, SPEC)
    write_checkpoint(source, tmp_path / "done", quantized(), SPEC)
    with pytest.raises(VLMQError, match="quantized already"):
        write_checkpoint(tmp_path / "done", tmp_path / "twice", quantized(), SPEC)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["done", "source", "taken"]


def test_a_head_that_was_tied_needs_room_of_its_own(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing but the head is quantized here, so the tensors of the checkpoint are exactly what is reckoned."""
    spec, head = QuantizationSpec(SCHEME, ignore=("layers",)), {"lm_head": quantized()[LINEARS[0]]}
    tied = {"lm_head": f"{LINEARS[0]}.weight"}  # stands for the embeddings
    write_checkpoint(source, tmp_path / "out", head, spec, tied=tied)
    size = sum(info.nbytes for info in read_tensor_index(tmp_path / "out").values())
    assert size == sum(info.nbytes for info in read_tensor_index(source).values()) + head["lm_head"].nbytes
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=size))
    write_checkpoint(source, tmp_path / "enough", head, spec, tied=tied)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=size - 1))
    with pytest.raises(VLMQError, match="free some space"):
        write_checkpoint(source, tmp_path / "short", head, spec, tied=tied)


def test_damage_is_named(source: Path, tmp_path: Path) -> None:
    shard = source / "model-00002-of-00002.safetensors"
    whole = shard.read_bytes()
    for size in (4, 40, len(whole) - 1):
        shard.write_bytes(whole[:size])
        with pytest.raises(VLMQError, match=r"model-00002.*(truncated|damaged)"):
            read_tensor_index(source)
    shard.unlink()
    with pytest.raises(VLMQError, match="not there"):
        read_tensor_index(source)


def test_faults_of_quantized_tensors_are_found(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_checkpoint(source, out, quantized(), SPEC)
    spec = QuantizationSpec.from_dict(json.loads((out / "config.json").read_text())["quantization_config"])
    tensors = read_tensor_index(out)
    key = f"{LINEARS[0]}.scales"
    lost = {name: info for name, info in tensors.items() if name != key}
    assert any(key in line and "missing" in line for line in find_problems(lost, spec))
    no_bias = {name: info for name, info in tensors.items() if not name.endswith(".bias")}
    assert any("removed or renamed" in line for line in find_problems(no_bias, spec))
    wrong_bits = QuantizationSpec(Scheme(4, 32), ignore=("lm_head",))
    assert all("w4g32" in line for line in find_problems(tensors, wrong_bits))
    assert find_problems(tensors, wrong_bits)


def test_headers_match_the_files(source: Path) -> None:
    path = source / "model-00001-of-00002.safetensors"
    infos, metadata = read_header(path)
    assert metadata == {"format": "pt"}
    for name, tensor in load_file(path).items():
        assert infos[name].shape == tuple(tensor.shape)
        assert infos[name].nbytes == tensor.numel() * tensor.element_size()
