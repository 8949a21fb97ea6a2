"""Intervals against known values and against simulation."""

import math
import random

import pytest

from vlmq_serve.evaluate.statistics import Proportion, by_task, crossed_mean, paired_difference


def test_wilson_interval_known_values() -> None:
    # Newcombe 1998, Statistics in Medicine 17, table I: 81 of 263 and 15 of 148.
    low, high = Proportion(81, 263).interval
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)
    low, high = Proportion(15, 148).interval
    assert (round(low, 4), round(high, 4)) == (0.0624, 0.1605)


def test_wilson_interval_at_the_ends() -> None:
    assert Proportion(0, 20).interval[0] == 0.0
    assert Proportion(20, 20).interval[1] == 1.0
    assert 0 < Proportion(20, 20).interval[0] < 1
    assert math.isnan(Proportion(0, 0).value)


def test_paired_difference_covers_the_truth() -> None:
    rng = random.Random(0)
    covered = 0
    for _ in range(400):
        base = [rng.random() < 0.8 for _ in range(300)]
        # The second model answers 10 % of the questions anew, at 50 %: the true difference is 0.1 * (0.8 - 0.5).
        other = [rng.random() < 0.5 if rng.random() < 0.1 else answer for answer in base]
        difference = paired_difference(base, other)
        covered += difference.low <= 0.03 <= difference.high
    assert 0.91 <= covered / 400 <= 0.99


def test_paired_difference_refuses_unequal_lists() -> None:
    with pytest.raises(ValueError, match="3 and 2"):
        paired_difference([True] * 3, [True] * 2)


def test_by_task() -> None:
    result = by_task(["count", "colour", "count"], [True, False, False])
    assert result == {"colour": Proportion(0, 1), "count": Proportion(1, 2)}


def test_crossed_mean_of_one_seed_is_the_normal_interval() -> None:
    result = crossed_mean([[1, 0, 1, 1]])
    half = 1.959963984540054 * math.sqrt(0.25 / 4)
    assert (result.value, round(result.high - result.value, 9)) == (0.75, round(half, 9))


def test_crossed_mean_covers_the_truth_where_seeds_differ() -> None:
    rng = random.Random(0)
    covered = 0
    for _ in range(300):
        easy = [rng.gauss(0, 1) for _ in range(40)]
        shifts = [rng.gauss(0, 0.3) for _ in range(8)]
        result = crossed_mean([[e + shift + rng.gauss(0, 0.5) for e in easy] for shift in shifts])
        covered += result.low <= 0 <= result.high
    assert 0.91 < covered / 300 <= 0.99


def test_crossed_mean_of_three_seeds_covers_the_truth() -> None:
    """With the normal quantile for seeds too it would cover 82 % of the truths here."""
    rng = random.Random(1)
    covered = 0
    for _ in range(300):
        shifts = [rng.gauss(0, 1) for _ in range(3)]
        result = crossed_mean([[shift + rng.gauss(0, 0.5) for _ in range(40)] for shift in shifts])
        covered += result.low <= 0 <= result.high
    assert 0.91 < covered / 300 <= 0.99


def test_crossed_mean_refuses_uneven_rows() -> None:
    with pytest.raises(ValueError, match="equal ones"):
        crossed_mean([[1, 0], [1]])
