"""`vlmq report` on real runs of the tiny random model."""

import json
import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from vlmq_serve.calibrate.page.read import read_run
from vlmq_serve.calibrate.pipeline import calibrate
from vlmq_serve.calibrate.recipe import make_recipe
from vlmq_serve.cli import app

ROOT = Path(__file__).resolve().parents[2]
MODEL, DATA = ROOT / "examples" / "tiny-qwen2vl", ROOT / "examples" / "data" / "calibration.jsonl"


def report(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["report", *arguments], env={"COLUMNS": "200"})


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("report") / "out"
    recipe = make_recipe(bits=3, group_size=64, samples=4, device="cpu", lm_head="w8g64", vision="w8g32")
    calibrate(MODEL, out, DATA, recipe)
    return out


class Page(HTMLParser):
    """Heads, and everything that a browser would fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.heads: list[str] = []
        self.fetched: list[str] = []
        self._inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._inside = tag
        given = dict(attrs)
        source = given.get("src") or (given.get("href") if tag == "link" else None)
        if source and not source.startswith(("data:", "#")):
            self.fetched.append(source)
        self.fetched += ["script"] if tag == "script" else []

    def handle_data(self, data: str) -> None:
        if self._inside == "h2" and data.strip():
            self.heads.append(data)


def test_one_page_with_every_plot_and_nothing_to_fetch(run: Path, tmp_path: Path) -> None:
    assert report(str(run), "-o", str(tmp_path / "r.html")).exit_code == 0
    text = (tmp_path / "r.html").read_text()
    page = Page(text)
    assert page.fetched == []
    assert not re.search(r"url\((?!#)|@import", text)
    plots = ["Error of the layers", "Error of the linears", "Importance", "Effective tokens", "Time and memory", "Size"]
    assert [head for head in page.heads if head in plots] == plots
    assert text.count("<svg") == len(plots)
    record = read_run(run)
    assert len(record.decoder) == 4 * 7 < len(record.linears)
    assert len(record.layers) == 4
    assert all(row["module"] in text for row in record.linears)
    assert f"{record.run['peak_memory_mib']:.0f} MiB" in text


def test_the_folder_of_the_report_alone_will_do(run: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere" / "vlmq"
    moved.parent.mkdir()
    moved.mkdir()
    for path in (run / "vlmq").iterdir():
        (moved / path.name).write_bytes(path.read_bytes())
    assert report(str(moved), "-o", str(tmp_path / "r.html")).exit_code == 0
    heads = Page((tmp_path / "r.html").read_text()).heads
    assert "Size" not in heads
    assert "Error of the layers" in heads


def test_an_earlier_page_is_kept_unless_told_otherwise(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    page = tmp_path / "report.html"
    page.write_text("earlier")
    for output in ([], ["-o", str(page)]):
        result = report(str(run), *output)
        assert result.exit_code == 1
        assert "exists already" in result.stderr
        assert "--overwrite" in result.stderr
        assert page.read_text() == "earlier"
    assert report(str(run), "--overwrite").exit_code == 0
    assert Page(page.read_text()).heads


def test_a_run_without_data_shows_its_weights(tmp_path: Path) -> None:
    calibrate(MODEL, tmp_path / "out", None, make_recipe(method="rtn", bits=4, group_size=64))
    assert report(str(tmp_path / "out"), "-o", str(tmp_path / "r.html")).exit_code == 0
    heads = Page((tmp_path / "r.html").read_text()).heads
    assert "Error of the layers" not in heads
    assert "Error of the linears" in heads


def test_no_run_is_one_error(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    damaged = Path(shutil.copytree(run / "vlmq", tmp_path / "damaged"))
    content = json.loads((damaged / "run.json").read_text())
    (damaged / "run.json").write_text(json.dumps({key: content[key] for key in content if key != "hashes"}))
    for arguments, message in (
        ([str(tmp_path)], "holds no run.json"),
        ([str(damaged)], "without ['hashes']"),
        ([str(tmp_path / "x")], "no such folder"),
        ([str(run), "-o", str(tmp_path / "x" / "r.html")], "does not exist"),
        ([str(run), "-o", str(tmp_path)], "cannot be written"),
    ):
        result = report(*arguments)
        assert result.exit_code == 1
        assert message in result.stderr
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = report(str(run), "-o", str(tmp_path / "r.html"))
    assert "pip install 'vlmq-serve[bench]'" in result.stderr
    assert not list(tmp_path.glob("*.html"))
