"""One row per method and scheme: means and intervals over questions and calibration seeds, paired with the baseline."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vlmq_serve.evaluate.divergence import Divergence
from vlmq_serve.evaluate.quality.measure import Cost, Measured
from vlmq_serve.evaluate.quality.variants import UNQUANTIZED
from vlmq_serve.evaluate.statistics import Difference, crossed_mean

BASELINE = "gptq"


@dataclass(frozen=True)
class Row:
    """A method (with its settings) at a scheme.

    `against` is the accuracy minus the baseline's, paired by question and seed; `won_back` the share of the baseline's
    loss that the method wins back, (a - a_baseline) / (a_bf16 - a_baseline), None where the baseline loses nothing that
    its interval can tell from zero. Divergence: mean over seeds; cost: median seconds, highest memory.
    """

    label: str
    scheme: str
    seeds: int
    accuracy: Difference
    per_task: Mapping[str, float]
    same_answer: float
    divergence: Divergence
    cost: Cost
    against: Difference | None = None
    won_back: float | None = None


def summarise(measured: Sequence[Measured], baseline: str = BASELINE) -> list[Row]:
    """Rows in the order of first appearance; the source model must be among `measured`."""
    reference = next(m for m in measured if m.variant.label == UNQUANTIZED)
    groups: dict[tuple[str, str], list[Measured]] = {}
    for entry in measured:
        groups.setdefault((entry.variant.label, entry.variant.scheme), []).append(entry)
    return [_row(group, groups.get((baseline, scheme)), reference) for (_, scheme), group in groups.items()]


def _row(group: Sequence[Measured], baseline: Sequence[Measured] | None, reference: Measured) -> Row:
    first = group[0].variant
    tasks = group[0].evaluation.per_task
    against = won_back = None
    if baseline is not None and baseline is not group and first.recipe is not None:
        against = _difference(group, baseline)
        lost = _difference([reference], baseline)
        won_back = against.value / lost.value if lost.low > 0 else None
    return Row(
        label=first.label,
        scheme=first.scheme,
        seeds=len(group),
        accuracy=_accuracy(group),
        per_task={task: statistics.fmean(m.evaluation.per_task[task].value for m in group) for task in tasks},
        same_answer=statistics.fmean(m.evaluation.agreement(reference.evaluation).value for m in group),
        divergence=Divergence(
            statistics.fmean(m.divergence.prompt for m in group), statistics.fmean(m.divergence.answer for m in group)
        ),
        cost=Cost(
            statistics.median(m.cost.seconds for m in group),
            max(m.cost.peak_memory_mib for m in group),
            group[0].cost.bytes,
        ),
        against=against,
        won_back=won_back,
    )


def _accuracy(group: Sequence[Measured]) -> Difference:
    if len(group) == 1:  # Wilson's interval holds up better near 0 and 1
        share = group[0].evaluation.overall
        return Difference(share.value, *share.interval)
    return crossed_mean([m.evaluation.correct for m in group])


def _difference(group: Sequence[Measured], other: Sequence[Measured]) -> Difference:
    """Paired by seed; what ran with one seed only (it needs no data) stands beside every seed of the other."""
    mine = {m.variant.seed: m.evaluation.correct for m in group}
    theirs = {m.variant.seed: m.evaluation.correct for m in other}
    seeds = sorted(mine.keys() & theirs.keys()) if min(len(mine), len(theirs)) > 1 else sorted({*mine, *theirs})
    table = []
    for seed in seeds:
        a, b = (table_of.get(seed) or next(iter(table_of.values())) for table_of in (mine, theirs))
        table.append([int(x) - int(y) for x, y in zip(a, b, strict=True)])
    return crossed_mean(table)
