"""Accuracy of every method with its interval, one panel per scheme."""

from collections.abc import Sequence
from pathlib import Path

from vlmq_serve.evaluate.quality.summary import Row


def write_plot(path: Path, rows: Sequence[Row]) -> None:
    """`path` (PNG or SVG by its suffix): dots with 95 % intervals, the source model as a dashed line."""
    from matplotlib.figure import Figure

    schemes = list(dict.fromkeys(row.scheme for row in rows if row.scheme))
    reference = next(row.accuracy.value for row in rows if not row.scheme)
    labels = list(dict.fromkeys(row.label for row in rows if row.scheme))
    figure = Figure(figsize=(1.5 + 3 * len(schemes), 1.2 + 0.3 * len(labels)), layout="constrained")
    panels = figure.subplots(1, len(schemes), sharey=True, squeeze=False)[0]
    for panel, scheme in zip(panels, schemes, strict=True):
        shown = [row for row in rows if row.scheme == scheme]
        heights = [labels.index(row.label) for row in shown]
        values = [100 * row.accuracy.value for row in shown]
        sides = [
            [100 * (row.accuracy.value - row.accuracy.low) for row in shown],
            [100 * (row.accuracy.high - row.accuracy.value) for row in shown],
        ]
        panel.errorbar(values, heights, xerr=sides, fmt="o", capsize=3)
        panel.axvline(100 * reference, linestyle="--", color="grey")
        panel.set_title(scheme)
        panel.set_xlabel("correct answers, %")
    panels[0].set_yticks(range(len(labels)), labels)
    panels[0].invert_yaxis()
    figure.savefig(path, dpi=130)
