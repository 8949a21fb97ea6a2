"""`vlmq bench kernels` on a CPU: measures, checks, goes on where it stopped; and how peers get their weight."""

import csv
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner, Result

from vlmq_serve.cli import app
from vlmq_serve.cli.bench import kernel_results
from vlmq_serve.cli.bench.kernels import _peers
from vlmq_serve.cli.bench.peers import vllm
from vlmq_serve.cli.bench.peers.auto_round import auto_round_peers
from vlmq_serve.cli.bench.peers.gemlite import gemlite_peers
from vlmq_serve.cli.bench.peers.vllm import vllm_peers
from vlmq_serve.format.errors import VLMQError
from vlmq_serve.format.scheme import Scheme
from vlmq_serve.kernels.bench import measure
from vlmq_serve.kernels.bench.candidates import PEER, Candidate
from vlmq_serve.kernels.bench.layers import LAYERS, Layer, random_weight

TINY = Layer("2B", "tiny", 128, 256)
CPU = torch.device("cpu")


def settings() -> measure.Settings:
    return measure.Settings(CPU, torch.bfloat16, 0.001, 1e10)


def bench(*arguments: object) -> Result:
    """Without peers where nothing else is said: importing vLLM takes longer than these tests."""
    return CliRunner().invoke(
        app, ["bench", "kernels", "--peers", "none", *map(str, arguments)], env={"COLUMNS": "200"}
    )


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command on one layer that takes no time."""
    monkeypatch.setattr("vlmq_serve.kernels.bench.layers.LAYERS", (TINY,))
    monkeypatch.setattr("vlmq_serve.kernels.bench.timing.cache_bytes", lambda _: 1 << 20)
    monkeypatch.setattr("vlmq_serve.kernels.bench.measure.cache_bytes", lambda _: 1 << 16)


@pytest.mark.unit
@pytest.mark.usefixtures("tiny")
def test_measures_shows_and_goes_on(tmp_path: Path) -> None:
    table, picture = tmp_path / "new" / "k.csv", tmp_path / "k.png"
    first = bench("-o", table, "--rows", "1,3", "--seconds", 0.001, "--plot", picture)
    assert first.exit_code == 0, first.output
    assert "times faster than torch bf16" in first.output
    assert picture.stat().st_size > 1000
    with table.open() as file:
        rows = list(csv.DictReader(file))
    assert {row["scheme"] for row in rows} == {"", "w4g128", "w3g128", "w2g128"}
    assert all(float(row["microseconds"]) > 0 and float(row["error"]) < 2e-2 for row in rows)
    assert {row["over_bf16"] for row in rows if row["path"] == "torch bf16"} == {"1"}
    before = table.read_text()
    again = bench("-o", table, "--rows", "1,3,5", "--seconds", 0.001)
    assert again.exit_code == 0, again.output
    assert table.read_text().startswith(before)
    assert {row.rows for row in kernel_results.read(table, measure.environment(settings()))} == {1, 3, 5}
    fresh = bench("-o", table, "--rows", "1", "--seconds", 0.001, "--fresh")
    assert fresh.exit_code == 0, fresh.output
    assert len(table.read_text().splitlines()) == 1 + 3 * len(rows) // 2


@pytest.mark.unit
@pytest.mark.usefixtures("tiny")
def test_what_has_to_be_asked_for_is_not_our_speed(tmp_path: Path) -> None:
    """The fastest of ours, in the summary, is a kernel that serves without being asked for."""
    result = bench("-o", tmp_path / "k.csv", "--rows", 1, "--seconds", 0.001, "--bits", 4)
    assert result.exit_code == 0, result.output
    found = kernel_results.read(tmp_path / "k.csv", measure.environment(settings()))
    kinds = {row.path.split()[0]: row.kind for row in found if row.kind != "dense"}
    assert kinds.pop("cpu_int8", "on request") == "on request"
    assert set(kinds.values()) == {"ours"}


@pytest.mark.unit
@pytest.mark.usefixtures("tiny")
def test_peers_on_a_cpu_are_measured_beside_ours(tmp_path: Path) -> None:
    result = bench("-o", tmp_path / "k.csv", "--rows", 1, "--seconds", 0.001, "--bits", 2, "--peers", "auto_round")
    assert result.exit_code == 0, result.output
    (peer,) = (r for r in kernel_results.read(tmp_path / "k.csv", measure.environment(settings())) if r.kind == PEER)
    assert peer.path == "AutoRound bf16"
    assert peer.error < 5e-3
    assert "ours over the fastest other" in result.output


@pytest.mark.unit
@pytest.mark.usefixtures("tiny")
def test_measures_symmetric_codes_of_8_bits(tmp_path: Path) -> None:
    result = bench("-o", tmp_path / "k.csv", "--rows", 1, "--seconds", 0.001, "--bits", 8, "--symmetric")
    assert result.exit_code == 0, result.output
    found = kernel_results.read(tmp_path / "k.csv", measure.environment(settings()))
    assert {row.scheme for row in found} == {"", "w8g128s"}


@pytest.mark.unit
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--models", "72B"), "--models: got"),
        (("--rows", "1;2"), "--rows: got '1;2'"),
        (("--rows", "4,0"), "--rows: got 0, allowed 1 and more"),
        (("--plot", "speed.foo"), "--plot speed.foo: got suffix '.foo', allowed "),
        (("--bits", "5"), "bits: got 5"),
        (("--dtype", "fp8"), "--dtype: got 'fp8'"),
        (("--device", "tpu"), "--device: got 'tpu'"),
        (("--device", "cpu", "--write-table", "t.json"), "--write-table: chooses between GPU kernels"),
    ],
)
def test_bad_input_is_one_error(arguments: tuple[str, ...], message: str, tmp_path: Path) -> None:
    result = bench(*arguments, "-o", tmp_path / "k.csv")
    assert result.exit_code == 1
    assert message in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.unit
def test_a_folder_is_no_table(tmp_path: Path) -> None:
    result = bench("-o", tmp_path, "--rows", 1)
    assert result.exit_code == 1
    assert f"--output {tmp_path}: cannot be written" in result.stderr


@pytest.mark.unit
def test_other_tables_are_not_overwritten(tmp_path: Path) -> None:
    other = tmp_path / "k.csv"
    other.write_text("a,b\n1,2\n")
    result = bench("-o", other)
    assert result.exit_code == 1
    assert "is not a table of this command" in result.stderr
    assert other.read_text() == "a,b\n1,2\n"


@pytest.mark.unit
def test_a_wrong_or_failing_peer_gets_no_time() -> None:
    def broken(_: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no kernel image")

    built, exact = measure.build_candidates(TINY, ["w4g128"], settings(), [])
    peers = [
        Candidate("wrong", PEER, "w4g128", torch.bfloat16, (lambda x: x[:, :128],), 1),
        Candidate("broken", PEER, "w4g128", torch.bfloat16, (broken,), 1),
    ]
    cell = measure.measure_cell(TINY, torch.randn(2, 256), [*built, *peers], exact, settings())
    bad = {m.path for m in cell if math.isnan(m.microseconds)}
    assert bad == {"wrong", "broken"}
    assert len(list(kernel_results.wrong(cell))) == 2


@pytest.mark.unit
def test_a_peer_that_fails_while_it_is_built_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise NotImplementedError("Invalid input shapes")

    fake = SimpleNamespace(DType=SimpleNamespace(BF16=0, FP16=1), GemLiteLinearTriton=refuse)
    monkeypatch.setitem(sys.modules, "gemlite", SimpleNamespace(core=fake))
    monkeypatch.setitem(sys.modules, "gemlite.core", fake)
    weight = random_weight(TINY, Scheme(4, 128), torch.bfloat16, CPU)
    assert list(gemlite_peers(weight, torch.bfloat16, 1)) == []


@pytest.mark.unit
def test_peers_are_chosen_by_name() -> None:
    assert _peers("vllm,gemlite,auto_round") == [vllm_peers, gemlite_peers, auto_round_peers]
    assert _peers("gemlite") == [gemlite_peers]
    assert _peers("none") == []
    with pytest.raises(
        VLMQError, match=r"--peers: got \['marlin'\], allowed \['vllm', 'gemlite', 'auto_round', 'none'\]"
    ):
        _peers("vllm,marlin")


@pytest.mark.unit
def test_layers_are_those_of_the_models() -> None:
    """Sizes of the published configs: hidden 1536 and 3584, intermediate 8960 and 18944, key-values 256 and 512."""
    for model, hidden, wide, pairs in (("2B", 1536, 8960, 256), ("7B", 3584, 18944, 512)):
        shapes = {x.name: (x.out_features, x.in_features) for x in LAYERS if x.model == model}
        assert shapes == {
            "qkv": (hidden + 2 * pairs, hidden), "o": (hidden, hidden),
            "gate_up": (2 * wide, hidden), "down": (hidden, wide),
        }  # fmt: skip


@pytest.fixture
def single_rank() -> Iterator[None]:
    vllm.start_single_rank()
    yield
    from vllm.distributed import cleanup_dist_env_and_memory

    cleanup_dist_env_and_memory()


@pytest.mark.serve
@pytest.mark.usefixtures("single_rank")
@pytest.mark.parametrize("symmetric", [False, True])
def test_vllm_reads_the_weight_that_we_gave(symmetric: bool) -> None:
    """vLLM's own repacking of our layer, done on the CPU, gives back codes, scales and zeros."""
    from vllm.model_executor.kernels.linear import TritonW4A16LinearKernel

    scheme = Scheme(4, 64, symmetric)
    weight = random_weight(TINY, scheme, torch.bfloat16, CPU)
    config = vllm.vllm_config(weight, torch.bfloat16)
    kernel = TritonW4A16LinearKernel(config, "weight_packed", "weight_scale", "weight_zero_point")
    layer = vllm.vllm_layer(weight, torch.bfloat16)
    kernel.process_weights_after_loading(layer)
    shifts = torch.arange(8) * 4

    def unpack(words: torch.Tensor) -> torch.Tensor:
        return ((words[..., None] >> shifts) & 15).flatten(-2)

    zeros = config.weight_type.bias if symmetric else unpack(layer.weight_zero_point).repeat_interleave(64, 0)
    codes = unpack(layer.weight_packed)
    dense = (codes - zeros).float() * layer.weight_scale.float().repeat_interleave(64, 0)
    assert torch.equal(dense.t(), weight.dequantize())


@pytest.mark.serve
@pytest.mark.usefixtures("single_rank")
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_peers_on_a_cpu_multiply_with_the_same_weight(bits: int, symmetric: bool) -> None:
    """vLLM's kernel for CPUs has 4 bits; AutoRound's has all. Both as close as their arithmetic: bf16 and fp32.
    AutoRound's sets the number of OpenMP's threads, which would slow down what is measured after it."""
    if torch.cuda.is_available():
        pytest.skip("an NVIDIA GPU: other peers run")
    if not torch.cpu._is_avx512_supported():
        pytest.skip("no AVX-512, which vLLM's kernel for CPUs needs")
    scheme = Scheme(bits, 128, symmetric)
    weight = random_weight(TINY, scheme, torch.bfloat16, CPU)
    found = [c for peers in (vllm_peers, gemlite_peers, auto_round_peers) for c in peers(weight, torch.bfloat16, 1)]
    assert [c.name for c in found] == [*(["CPUWNA16 bf16"] if bits == 4 else []), "AutoRound bf16"]
    threads = torch.get_num_threads()
    x = torch.randn(5, TINY.in_features).bfloat16()
    exact = x.double() @ weight.dequantize().double().t()
    for candidate in found:
        y = candidate.calls[0](x)
        assert y.dtype == torch.bfloat16
        assert (y.double() - exact).norm() / exact.norm() < 5e-3
    assert torch.get_num_threads() == threads


@pytest.mark.unit
def test_without_their_packages_peers_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "auto_round_kernel", None)
    weight = random_weight(TINY, Scheme(4, 128), torch.bfloat16, CPU)
    assert list(auto_round_peers(weight, torch.bfloat16, 1)) == []
