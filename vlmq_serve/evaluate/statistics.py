"""Accuracy with confidence intervals, and paired differences between two models on the same questions."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

Z95 = 1.959963984540054
"""Two-sided 95 % quantile of the normal distribution."""


_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""Two-sided 95 % quantiles of Student's t with 1, 2, ... degrees of freedom."""


def t95(degrees: int) -> float:
    """Two-sided 95 % quantile of Student's t; above 9 degrees of freedom z + (z^3 + z) / 4 n, right to 0.01."""
    return _T95[degrees - 1] if degrees <= len(_T95) else Z95 + (Z95**3 + Z95) / (4 * degrees)


@dataclass(frozen=True)
class Proportion:
    """`hits` of `total`, with its 95 % Wilson score interval (Wilson 1927, eq. 4)."""

    hits: int
    total: int

    @property
    def value(self) -> float:
        return self.hits / self.total if self.total else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """(low, high) in [0, 1]; (nan, nan) without questions."""
        if not self.total:
            return math.nan, math.nan
        n, p = self.total, self.value
        centre = (p + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
        half = Z95 / (1 + Z95**2 / n) * math.sqrt(p * (1 - p) / n + Z95**2 / (4 * n * n))
        return max(0.0, centre - half), min(1.0, centre + half)


@dataclass(frozen=True)
class Difference:
    """Mean of paired differences in [-1, 1] and its 95 % normal interval."""

    value: float
    low: float
    high: float


def paired_difference(first: Sequence[bool], second: Sequence[bool]) -> Difference:
    """Accuracy of `first` minus that of `second` on the same questions, in the same order.

    The interval uses the variance of the per-question difference, which is far smaller than that of two independent
    accuracies, since most questions are answered alike. Raises ValueError when the lengths differ or are below 2.
    """
    if len(first) != len(second) or len(first) < 2:
        raise ValueError(
            f"paired difference: got {len(first)} and {len(second)} answers, needs two equal lists of >= 2"
        )
    differences = [int(a) - int(b) for a, b in zip(first, second, strict=True)]
    n = len(differences)
    mean = sum(differences) / n
    variance = sum((d - mean) ** 2 for d in differences) / (n - 1)
    half = Z95 * math.sqrt(variance / n)
    return Difference(mean, mean - half, mean + half)


def by_task(tasks: Sequence[str], correct: Sequence[bool]) -> dict[str, Proportion]:
    """Proportion of correct answers per task, in alphabetical order."""
    result = {}
    for task in sorted(set(tasks)):
        hits = [c for t, c in zip(tasks, correct, strict=True) if t == task]
        result[task] = Proportion(sum(hits), len(hits))
    return result


def crossed_mean(table: Sequence[Sequence[float]]) -> Difference:
    """Mean of values [seeds][questions] with a 95 % interval over both: other questions, other calibration seeds.

    Every seed answers the same questions, so the variance of the mean is that of question means over their number plus
    that of seed means over theirs (the pigeonhole bootstrap's estimate, Owen 2007, errs on the wide side). Seeds are
    few: their part is widened by Student's t. With one seed only the questions count. Raises ValueError on rows of
    different lengths or fewer than 2 questions.
    """
    questions = len(table[0]) if table else 0
    if questions < 2 or any(len(row) != questions for row in table):
        raise ValueError(f"crossed mean: got rows of {[len(row) for row in table]}, needs equal ones of >= 2")
    by_seed = [sum(row) / questions for row in table]
    by_question = [sum(column) / len(table) for column in zip(*table, strict=True)]
    mean = sum(by_seed) / len(table)
    squared = Z95**2 * _variance_of_mean(by_question, mean)
    if len(table) > 1:
        squared += t95(len(table) - 1) ** 2 * _variance_of_mean(by_seed, mean)
    half = math.sqrt(squared)
    return Difference(mean, mean - half, mean + half)


def _variance_of_mean(values: Sequence[float], mean: float) -> float:
    return sum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values)
