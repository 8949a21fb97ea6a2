"""Ratios of paired measurements and their intervals. That servers and engines answer, their tables show."""

import random
import statistics

import pytest

from benchmarks.serving.rounds import Timing, median_interval, question, summary, turns

pytestmark = pytest.mark.unit


def test_ratios_are_of_one_round() -> None:
    """Twice as fast in every round, whatever the machine does between rounds; a column of its own for each."""
    timings = [
        Timing(turn, "cpu", name, factor * turn, later * turn)
        for turn in range(1, 21)
        for name, factor, later in (("bf16", 10, 4), ("w4", 5, 1))
    ]
    assert [*summary(timings, "bf16")] == [
        "first_ms bf16: 105.00, bf16 over own 1.00 (1.00 to 1.00), 20 rounds",
        "first_ms w4: 52.50, bf16 over own 2.00 (2.00 to 2.00), 20 rounds",
        "later_ms bf16: 42.00, bf16 over own 1.00 (1.00 to 1.00), 20 rounds",
        "later_ms w4: 10.50, bf16 over own 4.00 (4.00 to 4.00), 20 rounds",
    ]


@pytest.mark.parametrize(("count", "rank"), [(6, 1), (10, 2), (20, 6), (30, 10), (3, 1)])
def test_intervals_are_those_of_order_statistics(count: int, rank: int) -> None:
    """Ranks as tables of the sign test have them; too few values leave the whole range."""
    low, middle, high = median_interval([*range(1, count + 1)])
    assert (low, high) == (rank, count + 1 - rank)
    assert middle == (count + 1) / 2


def test_intervals_hold_the_median_as_often_as_they_say() -> None:
    chance = random.Random(0)
    draws = [[chance.lognormvariate(0, 1) for _ in range(20)] for _ in range(2000)]
    held = statistics.mean(low <= 1 <= high for low, _, high in map(median_interval, draws))
    assert 0.945 <= held <= 0.975


def test_questions_differ_from_round_to_round_and_not_between_variants() -> None:
    first, again, other = (question(random.Random(seed), 8, 28, seed) for seed in (1, 1, 2))
    assert first == again
    assert first[0]["image_url"]["url"].startswith("data:image/png;base64,")
    assert all(ours != theirs for ours, theirs in zip(first, other, strict=True))
    assert len(question(random.Random(1), 8, 0, 1)) == 1


def test_all_are_asked_the_same_once_a_round_in_orders_of_chance() -> None:
    """Round 0 too, which warms up; an order that stood still would favour whoever comes after an idle variant."""
    asked = [*turns(["w4", "bf16", "w2"], 8, words=4, image=0)]
    rounds = [asked[start : start + 3] for start in range(0, len(asked), 3)]
    assert [{turn.round for turn in each} for each in rounds] == [{number} for number in range(9)]
    assert all(sorted(turn.variant for turn in each) == ["bf16", "w2", "w4"] for each in rounds)
    assert all(turn.content == each[0].content for each in rounds for turn in each)
    assert len({tuple(turn.variant for turn in each) for each in rounds}) > 2
