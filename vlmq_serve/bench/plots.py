"""Throughput against latency, and memory by variant."""

from collections.abc import Sequence
from pathlib import Path

from vlmq_serve.bench.tables import FLOOR, Row


def plot_all(out: Path, rows: Sequence[Row]) -> list[Path]:
    """Write the plots of what was measured into `out`; needs matplotlib, writes none where it is not installed."""
    try:
        import matplotlib
    except ImportError:
        return []
    matplotlib.use("Agg")
    shown = [row for row in rows if row.variant != FLOOR]
    written = [_plot_memory(out / "memory.png", shown)]
    if any(row.load for row in shown):
        written.append(_plot_latency(out / "throughput-latency.png", [row for row in shown if row.load]))
    return written


def _plot_latency(path: Path, rows: Sequence[Row]) -> Path:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for name in dict.fromkeys(row.variant for row in rows):
        points = sorted(
            (row.values["output tokens/s"], row.values["TPOT ms"], row.load) for row in rows if row.variant == name
        )
        axes.plot([p[0] for p in points], [p[1] for p in points], "o-", label=name)
    axes.set(xlabel="output tokens per second", ylabel="median time per output token, ms")
    axes.set_ylim(bottom=0)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path


def _plot_memory(path: Path, rows: Sequence[Row]) -> Path:
    from matplotlib import pyplot

    names = list(dict.fromkeys(row.variant for row in rows))
    first = {name: next(row for row in rows if row.variant == name).values for name in names}
    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    columns = {"disk_mib": "on disk", "ready_mib": "all processes, ready", "peak_mib": "all processes, peak"}
    for index, (column, label) in enumerate(columns.items()):
        places = [place + 0.27 * (index - 1) for place in range(len(names))]
        axes.bar(places, [first[name][column] for name in names], 0.25, label=label)
    axes.set_xticks(range(len(names)), names)
    axes.set_ylabel("MiB")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path
