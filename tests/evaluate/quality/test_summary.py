"""Rows of the table from made-up answers whose statistics are known."""

import csv
import random

import pytest

from vlmq_serve.calibrate.recipe import make_recipe
from vlmq_serve.evaluate.divergence import Divergence
from vlmq_serve.evaluate.quality.measure import Cost, Measured
from vlmq_serve.evaluate.quality.plot import write_plot
from vlmq_serve.evaluate.quality.summary import summarise
from vlmq_serve.evaluate.quality.tables import write_csv, write_markdown
from vlmq_serve.evaluate.quality.variants import UNQUANTIZED, Variant
from vlmq_serve.evaluate.run import Evaluation

QUESTIONS = 200


def measured(label: str, hits: int, seed: int = 0, kl: float = 0.1) -> Measured:
    """The first `hits` questions right; every other question is of kind b."""
    answers = tuple("yes" if i < hits else "no" for i in range(QUESTIONS))
    tasks = tuple("ab"[i % 2] for i in range(QUESTIONS))
    evaluation = Evaluation(label, "data", tasks, ("yes",) * QUESTIONS, answers)
    recipe = None if label == UNQUANTIZED else make_recipe(method=label.partition(":")[0])
    scheme = "" if recipe is None else "w3g64"
    return Measured(Variant(label, scheme, seed, recipe), evaluation, Divergence(2 * kl, kl), Cost(seed, 100 + seed))


RUNS = [
    measured(UNQUANTIZED, 190, kl=0),
    measured("rtn", 50),
    measured("gptq", 144),
    measured("gptq", 146, seed=1),
    measured("vlmq", 160, kl=0.3),
    measured("vlmq", 160, seed=1, kl=0.1),
]


def test_means_pairs_and_the_share_won_back():
    rows = {row.label: row for row in summarise(RUNS)}
    vlmq = rows["vlmq"]
    assert vlmq.seeds == 2
    assert vlmq.accuracy.value == pytest.approx(0.8)
    assert vlmq.against is not None
    assert vlmq.against.value == pytest.approx((0.8 - 0.72 + 0.8 - 0.73) / 2)
    assert vlmq.won_back == pytest.approx(0.075 / (0.95 - 0.725))
    assert vlmq.divergence == Divergence(pytest.approx(0.4), pytest.approx(0.2))
    assert (vlmq.cost.seconds, vlmq.cost.peak_memory_mib) == (0.5, 101)
    assert vlmq.per_task == {"a": pytest.approx(0.8), "b": pytest.approx(0.8)}
    assert vlmq.same_answer == pytest.approx(1 - 30 / QUESTIONS)
    assert rows["gptq"].against is None
    assert rows[UNQUANTIZED].against is None
    assert rows["rtn"].against is not None
    assert rows["rtn"].against.value == pytest.approx(0.25 - 0.725)


def test_another_baseline(tmp_path):
    rows = summarise(RUNS, "vlmq")
    write_markdown(tmp_path / "t.md", rows, [], "vlmq")
    gptq = next(row for row in rows if row.label == "gptq")
    assert gptq.against is not None
    assert gptq.against.value == pytest.approx(0.725 - 0.8)
    assert "| minus vlmq |" in (tmp_path / "t.md").read_text()


def test_no_share_where_the_baseline_loses_nothing():
    rows = summarise([measured(UNQUANTIZED, 190), measured("gptq", 190), measured("vlmq", 190)])
    assert rows[2].won_back is None


def test_the_interval_of_a_difference_is_that_of_pairs():
    """Most questions are answered alike: the interval of the pairs is narrower than that of either accuracy."""
    row = summarise([RUNS[0], RUNS[2], RUNS[4]])[-1]
    assert row.against is not None
    width, unpaired = row.against.high - row.against.low, row.accuracy.high - row.accuracy.low
    assert 0 < row.against.low < row.against.value < row.against.high
    assert width < 0.8 * unpaired


def test_files_hold_every_figure(tmp_path):
    write_csv(tmp_path / "t.csv", RUNS)
    rows = summarise(RUNS)
    write_markdown(tmp_path / "t.md", rows, ["about the data"])
    write_plot(tmp_path / "t.png", rows)
    with (tmp_path / "t.csv").open() as handle:
        lines = list(csv.DictReader(handle))
    assert len(lines) == len(RUNS) * 3
    whole = [line for line in lines if line["task"] == "all"]
    assert [float(line["accuracy"]) for line in whole] == [0.95, 0.25, 0.72, 0.73, 0.8, 0.8]
    text = (tmp_path / "t.md").read_text()
    assert "| vlmq | w3g64 | 2 | 80.0% (" in text
    assert "| 33% | 0.4000 | 0.2000 |" in text
    assert (tmp_path / "t.png").read_bytes().startswith(b"\x89PNG")


def test_intervals_over_seeds_are_wider_when_seeds_disagree():
    rng = random.Random(0)
    calm = [measured("vlmq", 150, seed) for seed in range(3)]
    wild = [measured("vlmq", 150 + rng.choice([-30, 30]) * (seed != 1), seed) for seed in range(3)]
    widths = []
    for group in (calm, wild):
        accuracy = summarise([RUNS[0], *group])[1].accuracy
        widths.append(accuracy.high - accuracy.low)
    assert widths[1] > 1.2 * widths[0]
