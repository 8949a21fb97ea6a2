"""`vlmq verify` on sound and on damaged checkpoints: one line per fault, an exit status, and vLLM's own rules."""

import os
import re
import shutil
import signal
import struct
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

from tests.quant_methods.checkpoints import edit_config, quantize, quantize_parts
from vlmq_serve.cli import app
from vlmq_serve.verify import ranks
from vlmq_serve.verify.ranks import RankResult, without_echoes
from vlmq_serve.verify.vllm_rules import check_with_vllm

MODEL = Path(__file__).resolve().parents[2] / "examples" / "tiny-qwen2vl"
LINEAR = "model.layers.1.mlp.up_proj"


def verify(folder: Path, *options: str) -> Result:
    return CliRunner().invoke(app, ["verify", str(folder), *options], env={"COLUMNS": "300"})


def lines(result: Result, level: str) -> list[str]:
    return [line for line in result.stdout.splitlines() if line.startswith(level)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantize(MODEL, tmp_path_factory.mktemp("verify") / "w3", "w3g32")


@pytest.fixture
def copy(checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "copy"))


@pytest.fixture
def without_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)  # what Python itself takes for "cannot be imported"


def edit(suffix: str, change: Callable[[torch.Tensor], object]) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        path = folder / "model.safetensors"
        tensors = load_file(path)
        change(tensors[f"{LINEAR}.{suffix}"])
        save_file(tensors, path, {"format": "pt"})

    return damage


def drop(name: str, forget: bool = False) -> Callable[[Path], object]:
    """Remove a tensor; `forget` also removes the hash that would tell."""

    def damage(folder: Path) -> None:
        path = folder / "model.safetensors"
        tensors = load_file(path)
        del tensors[name]
        save_file(tensors, path, {"format": "pt"})
        if forget:
            edit_config(folder, hashes={})

    return damage


def tie_head(folder: Path) -> None:
    """A quantized head beside config.json that says there is none."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for suffix in ("qweight", "scales", "zeros"):
        tensors[f"lm_head.{suffix}"] = tensors[f"{LINEAR}.{suffix}"].clone()
    save_file(tensors, path, {"format": "pt"})
    edit_config(folder, hashes={}, ignore=["model.visual"])


def add_experts(folder: Path) -> None:
    """A mixture-of-experts layer that config.json does not ignore."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.experts.0.up_proj.weight"] = torch.zeros(512, 192)
    save_file(tensors, path, {"format": "pt"})
    edit_config(folder, hashes={})


DAMAGES = [
    pytest.param(edit("scales", lambda t: t[3, 1].fill_(float("nan"))), "got 1 values that are not finite", id="nan"),
    pytest.param(edit("scales", lambda t: t[0].neg_()), "expected positive ones", id="negative-scale"),
    pytest.param(edit("scales", lambda t: t[0, 0].fill_(1e30)), "up to 10000", id="flipped-exponent"),
    pytest.param(edit("zeros", lambda t: t[5:7].fill_(9)), r"got 12 zero points above 7", id="zero-point"),
    pytest.param(edit("qweight", lambda t: t.zero_()), "every word is the same", id="nothing-written"),
    pytest.param(drop("model.norm.weight"), "was removed or renamed", id="tensor-removed"),
    pytest.param(drop(f"{LINEAR}.zeros", forget=True), rf"{LINEAR}.zeros: missing", id="zeros-removed"),
    pytest.param(lambda f: (f / "tokenizer.json").unlink(), "tokenizer: found none", id="tokenizer"),
    pytest.param(lambda f: (f / "preprocessor_config.json").unlink(), "image processor: found none", id="processor"),
    pytest.param(lambda f: edit_config(f, bits=5), "bits: got 5, allowed", id="bits"),
    pytest.param(tie_head, "lm_head: is quantized, but tie_word_embeddings is true in config.json and", id="tied-head"),
    pytest.param(add_experts, r"experts\.0\.up_proj: got mixture-of-experts weights", id="experts"),
    pytest.param(
        lambda f: edit_config(f, overrides={"layers.9": {"bits": 2, "group_size": 32, "symmetric": False}}),
        r"overrides: 'layers\.9' fits no quantized linear",
        id="misspelt-override",
    ),
]


@pytest.mark.unit
@pytest.mark.usefixtures("without_vllm")
@pytest.mark.parametrize(("damage", "message"), DAMAGES)
def test_damage_is_one_error_line_and_exit_status_1(copy: Path, damage: Callable, message: str) -> None:
    damage(copy)
    result = verify(copy)
    assert result.exit_code == 1, result.output
    errors = lines(result, "error")
    assert len(errors) == 1, errors
    assert re.search(message, errors[0])
    assert "Traceback" not in result.output


@pytest.mark.unit
@pytest.mark.usefixtures("without_vllm")
def test_without_vllm_it_says_what_was_not_checked(checkpoint: Path) -> None:
    result = verify(checkpoint, "--tp", "2")
    assert result.exit_code == 0, result.output
    assert lines(result, "skipped") == [
        "skipped  vllm     vllm is not installed: its names, fused layers and shapes were not checked"
    ]
    assert {line.split()[1] for line in lines(result, "ok")} == {
        "files", "tensors", "config", "contents", "split", "forward"
    }  # fmt: skip


@pytest.mark.unit
def test_a_folder_that_is_not_quantized_is_an_error() -> None:
    result = verify(MODEL)
    assert result.exit_code == 1
    assert "is not quantized" in lines(result, "error")[0]


@pytest.mark.unit
def test_a_missing_folder_is_one_error(tmp_path: Path) -> None:
    result = verify(tmp_path / "nothing")
    assert result.exit_code == 1
    assert "no such folder" in result.stderr


LOST = RankResult(1, error="Broken pipe")


@pytest.mark.unit
@pytest.mark.parametrize(
    ("results", "kept"),
    [
        ([RankResult(0, error="no parameter named 'extra'"), LOST], [0]),
        (
            [
                LOST,
                RankResult(2, error="[pair.cc] Connection closed by peer"),
                RankResult(3, error="K"),
            ],
            [3],
        ),
        ([RankResult(0, parameters=9), LOST], [0, 1]),
        ([RankResult(0, error="A"), RankResult(1, error="B")], [0, 1]),
    ],
)
def test_a_rank_that_lost_its_peer_is_shown_only_where_no_other_says_why(results: list, kept: list) -> None:
    assert [result.rank for result in without_echoes(results)] == kept


def never_come(*_: object) -> None:
    raise ValueError("no such device")


def killed(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def find_much_missing(rank: int, _: int) -> RankResult:
    return RankResult(rank, missing=tuple(f"model.layers.{i}.mlp.down_proj.qweight" for i in range(10_000)))


def find_nothing(rank: int, _: int) -> RankResult:
    return RankResult(rank)


def meet(rank: int, port: int) -> RankResult:
    """As `init_distributed_environment`, which waits until all ranks are there."""
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    return RankResult(rank)


def on_two_ranks(first: Callable, second: Callable, monkeypatch: pytest.MonkeyPatch) -> tuple[list[RankResult], float]:
    """What the ranks found, and in how many seconds."""
    monkeypatch.setattr(ranks, "_open_on_rank", lambda _, __, rank, port: (first, second)[rank](rank, port))
    started = time.monotonic()
    return ranks._run_ranks(Path(), None, 2), time.monotonic() - started


@pytest.mark.unit
@pytest.mark.parametrize(
    ("fault", "error"), [(never_come, "no such device"), (killed, "rank 1 ended with status -9 and no result")]
)
def test_a_rank_does_not_wait_long_for_one_that_failed(
    fault: Callable, error: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranks, "GRACE_S", 1)
    found, seconds = on_two_ranks(meet, fault, monkeypatch)
    assert found == [RankResult(1, error=error)]
    assert seconds < 60


@pytest.mark.unit
def test_a_rank_that_ends_in_the_middle_of_what_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    def cut_off(folder: Path, config: object, rank: int, port: int, writer: Connection) -> None:
        os.write(writer.fileno(), struct.pack("!i", 100) + b"less than 100 bytes")
        killed()

    monkeypatch.setattr(ranks, "_run_rank", cut_off)
    assert ranks._run_ranks(Path(), None, 1) == [RankResult(0, error="rank 0 ended with status -9 and no result")]


@pytest.mark.unit
def test_a_rank_that_fails_later_is_heard_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def late(*_: object) -> None:
        time.sleep(1)
        raise ValueError("no such file")

    found, _ = on_two_ranks(late, never_come, monkeypatch)
    assert [result.error for result in found] == ["no such device", "no such file"]


@pytest.mark.unit
def test_ranks_that_have_much_to_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """More than a pipe holds, so that it must be read while they write."""
    found, seconds = on_two_ranks(find_much_missing, find_nothing, monkeypatch)
    assert [len(result.missing) for result in sorted(found, key=lambda result: result.rank)] == [10_000, 0]
    assert seconds < 60


@pytest.mark.serve
def test_vllm_opens_a_sound_checkpoint_on_two_ranks(checkpoint: Path) -> None:
    """The vision tower has three heads, so vLLM itself can split the decoder only; the command finds that out."""
    result = verify(checkpoint, "--tp", "2")
    assert result.exit_code == 0, result.output
    assert any(
        "3 is not divisible by 2" in line and "--mm-encoder-tp-mode data" in line for line in lines(result, "note")
    )
    assert any("opened by vLLM on 2 ranks" in line for line in lines(result, "ok"))


@pytest.mark.serve
def test_vllm_opens_a_checkpoint_with_all_parts(tmp_path: Path) -> None:
    parts = {"lm_head": "w8", "vision": "w4", "embeddings": "w4"}
    checkpoint = quantize_parts(MODEL, tmp_path / "all", "w3g64", unfit="group", **parts)
    result = verify(checkpoint)
    assert result.exit_code == 0, result.output
    (opened,) = [line for line in lines(result, "ok") if "opened by vLLM" in line]
    # Four decoder layers of four fused linears, three vision layers of four, two of the merger, head and embeddings.
    assert "32 of them packed weights" in opened


@pytest.mark.serve
def test_vllm_misses_plain_tensors_that_nothing_else_misses(copy: Path) -> None:
    """One of a layer of its own, and one of three that vLLM fuses."""
    names = ("blocks.1.mlp.fc1.weight", "layers.2.self_attn.v_proj.bias")
    for end in names:
        name = next(key for key in load_file(copy / "model.safetensors") if key.endswith(end))
        drop(name, forget=True)(copy)
    findings = check_with_vllm(copy, 1)
    assert [finding.level for finding in findings] == ["error", "error"]
    for end, finding in zip(names, findings, strict=True):
        assert f"{end}: vLLM found no tensor" in finding.message


@pytest.mark.serve
def test_vllm_refuses_what_it_does_not_know(copy: Path) -> None:
    path = copy / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.0.mlp.extra.weight"] = torch.zeros(2, 2)
    save_file(tensors, path, {"format": "pt"})
    edit_config(copy, hashes={})
    findings = check_with_vllm(copy, 1)
    assert [finding.level for finding in findings] == ["error"]
    assert "extra" in findings[0].message
