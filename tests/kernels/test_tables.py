"""Tables of measured plans: written, read back, found by device, and refused with one error when they are wrong."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from vlmq_serve.format.errors import VLMQError
from vlmq_serve.kernels import tables
from vlmq_serve.kernels.gpu import Gpu
from vlmq_serve.kernels.plan import Plan
from vlmq_serve.kernels.tiles import Tile, gemv_tiles, known_tiles

pytestmark = pytest.mark.unit

H100 = Gpu(90, 132, 80 << 30, "NVIDIA H100 80GB HBM3")
KEY = (4, 3584, 18944)
PLANS = {1: Plan(gemv_tiles(4)[0], 8), 16: Plan(Tile(16, 64, 4, 3), 4, 0, False), 1024: Plan(None)}


@pytest.fixture(autouse=True)
def nothing_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(tables.ENVIRONMENT, raising=False)
    tables._load.cache_clear()
    tables._table.cache_clear()


def table(device: str = H100.name) -> tables.Table:
    rows = [tables.row_of(KEY, m, p) for m, p in PLANS.items()]
    return tables.Table(device=device, arch=90, environment={"triton": "3.9.0"}, plans=rows[::-1])


def test_what_is_written_is_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new" / "h100.json"
    tables.write(path, table())
    monkeypatch.setenv(tables.ENVIRONMENT, str(path))
    assert dict(tables.measured_plans(H100)) == {KEY: tuple(PLANS.items())}
    assert [p.name for p in path.parent.iterdir()] == ["h100.json"]


def test_layers_can_be_left_to_vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [tables.LayerRow(bits=4, N=3584, K=18944)]
    tables.write(tmp_path / "t.json", table().model_copy(update={"vllm": rows}))
    monkeypatch.setenv(tables.ENVIRONMENT, str(tmp_path / "t.json"))
    monkeypatch.setattr(tables, "gpu_of", lambda _: H100)
    cuda = torch.device("cuda")
    assert tables.prefers_vllm(cuda, *KEY)
    assert not tables.prefers_vllm(cuda, 3, *KEY[1:])
    assert not tables.prefers_vllm(torch.device("cpu"), *KEY)
    assert dict(tables.measured_plans(H100)) == {KEY: tuple(PLANS.items())}


def test_the_fingerprint_is_that_of_the_table_in_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled graphs are kept by it: a shipped table that comes or changes must change it."""
    monkeypatch.setattr(tables, "SHIPPED", tmp_path)
    found = [tables.fingerprint()]
    for device in ("NVIDIA L4", H100.name):
        tables.write(tmp_path / "shipped.json", table(device))
        found.append(tables.fingerprint())
    tables.write(tmp_path / "own" / "table.json", table())
    monkeypatch.setenv(tables.ENVIRONMENT, str(tmp_path / "own" / "table.json"))
    assert tables.fingerprint() == found[-1]
    monkeypatch.setenv(tables.ENVIRONMENT, str(tmp_path / "missing.json"))
    assert tables.fingerprint() == found[0] == ""
    assert len(set(found)) == 3


@pytest.mark.parametrize("bits", [3, 8])
def test_every_tile_survives_the_file(bits: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plans = {m + 1: Plan(t) for m, t in enumerate(known_tiles(bits, 90)) if not t.gemv}
    rows = [tables.row_of((bits, 64, 512), m, p) for m, p in plans.items()]
    tables.write(tmp_path / "t.json", tables.Table(device=H100.name, arch=90, plans=rows))
    monkeypatch.setenv(tables.ENVIRONMENT, str(tmp_path / "t.json"))
    assert tables.measured_plans(H100)[bits, 64, 512] == tuple(plans.items())


def test_a_shipped_table_is_found_by_the_name_of_the_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "SHIPPED", tmp_path)
    assert tables.file_name(H100.name) == "nvidia-h100-80gb-hbm3.json"
    assert tables.measured_plans(H100) == {}
    tables._load.cache_clear()
    tables._table.cache_clear()
    tables.write(tmp_path / tables.file_name(H100.name), table())
    assert KEY in tables.measured_plans(H100)
    assert tables.measured_plans(Gpu(80, 108, 40 << 30, "NVIDIA A100-SXM4-40GB")) == {}


def test_shipped_tables_are_sound() -> None:
    for path in tables.SHIPPED.glob("*.json"):
        content = json.loads(path.read_text())
        assert path.name == tables.file_name(content["device"])
        assert tables.measured_plans(Gpu(content["arch"], 1, 1 << 30, content["device"]))


def broken(**changes: Any) -> str:
    content = json.loads(table().model_dump_json())
    content["plans"][0] |= changes.pop("row", {})
    return json.dumps(content | changes)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "the file: Input should be"),
        (broken(device="NVIDIA L4"), "is for 'NVIDIA L4' (sm_90), this GPU is 'NVIDIA H100 80GB HBM3' (sm_90)"),
        (broken(arch=80), "is for 'NVIDIA H100 80GB HBM3' (sm_80), this GPU is 'NVIDIA H100 80GB HBM3' (sm_90)"),
        (broken(row={"bits": 5}), "plans.0.bits: Value error, allowed [2, 3, 4, 8], got 5"),
        (broken(row={"split": 3}), "plans.0.split: Input should be 1, 2, 4 or 8, got 3"),
        (broken(row={"kernel": "best"}), "plans.0.kernel: Input should be 'gemv', 'fused' or 'dense', got 'best'"),
        (broken(row={"warp": 3}), "plans.0.warp"),
        (broken(row={"kernel": "fused", "rows_m": 24, "rows_n": 128}), "got a fused tile of 24 by 128 rows, allowed"),
        (broken(row={"kernel": "gemv", "rows_m": 1, "rows_n": 128, "M": 2}), "got a gemv tile of 1 rows for M=2"),
        (broken(row={"M": 16}), "a second row for W4 N=3584 K=18944 M=16"),
        (broken(plans=[{"bits": 4}]), "plans.0.N: Field required"),
    ],
)
def test_a_bad_table_is_one_error(text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "t.json"
    path.write_text(text)
    monkeypatch.setenv(tables.ENVIRONMENT, str(path))
    with pytest.raises(VLMQError) as caught:
        tables.measured_plans(H100)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_table_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(tables.ENVIRONMENT, str(tmp_path / "none.json"))
    with pytest.raises(VLMQError, match="cannot be read"):
        tables.measured_plans(H100)


def test_no_table_from_kernels_that_are_all_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from vlmq_serve.kernels import triton_path
    from vlmq_serve.kernels.bench.layers import Layer
    from vlmq_serve.kernels.bench.measure import Settings
    from vlmq_serve.kernels.bench.tuning import tune_layer

    monkeypatch.setattr(triton_path, "run", lambda x, weight, _: x.new_zeros(x.shape[0], weight.out_features))
    settings = Settings(torch.device("cpu"), torch.bfloat16, 0.0, 1e10)
    with pytest.raises(VLMQError, match="W4 N=40 K=512 M=3: every kernel is wrong"):
        next(tune_layer(Layer("test", "small", 40, 512), [3], ["w4g64"], settings))


def test_a_table_is_measured_written_and_used(tmp_path: Path) -> None:
    """The whole way, in a process of its own with Triton's interpreter for a GPU."""
    pytest.importorskip("triton")
    path = tmp_path / "t.json"
    root = Path(__file__).parents[2]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join((str(root), os.environ.get("PYTHONPATH", ""))),
        "OMP_NUM_THREADS": "1",
        "TRITON_INTERPRET": "1",
    }
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.kernels.triton_tuning", str(path)], env=environment, cwd=root,
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    got = json.loads(done.stdout)
    assert {(row["bits"], row["M"]) for row in got["first"]} == {(4, 1), (4, 3), (2, 1), (2, 3)}
    assert got["vllm"] == [{"bits": 2, "N": 40, "K": 512}]
    assert sorted(got["again"]) == [[2, 1], [2, 3], [4, 1]]
    assert got["measured"] == [1]
    assert got["used"]
    assert got["error"] < 5e-3
    assert got["notes"] == ["test small, M=1", "test small, M=3"]
