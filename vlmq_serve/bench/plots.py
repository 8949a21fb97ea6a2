"""Throughput against latency, and memory by variant."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmq_serve.bench.rows import FLOOR, Row
from vlmq_serve.bench.variants import Load

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LATENCIES = {"TTFT ms": "time to first token, ms", "TPOT ms": "time per output token, ms"}
BARS = {"disk_mib": "on disk", "weights_mib": "weights", "ready_mib": "processes, ready", "peak_mib": "processes, peak"}
DEVICE_BARS = {"disk_mib": "on disk", "weights_mib": "weights", "device_mib": "GPU, with KV cache, peak"}


def plot_all(out: Path, rows: Sequence[Row], device: str) -> list[Path]:
    """Write the plots of what was measured into `out`; needs matplotlib, writes none where it is not installed."""
    try:
        import matplotlib
    except ImportError:
        return []
    matplotlib.use("Agg")
    shown = [row for row in rows if row.variant != FLOOR]
    written = [_plot_memory(out / "memory.png", shown, device)] if shown else []
    closed = [row for row in shown if row.load and Load.parse(row.load).rate == float("inf")]
    if closed:
        written.append(_plot_latency(out / "throughput-latency.png", closed, device))
    return written


def _plot_latency(path: Path, rows: Sequence[Row], device: str) -> Path:
    """One column per shape of requests, one line per variant over its concurrencies, which stand at the points."""
    from matplotlib import pyplot

    shapes = list(dict.fromkeys(Load.parse(row.load).shape for row in rows))
    names = list(dict.fromkeys(row.variant for row in rows))
    size = (4 * len(shapes) + 1, 7)
    figure, grid = pyplot.subplots(len(LATENCIES), len(shapes), figsize=size, squeeze=False)
    for column, shape in enumerate(shapes):
        chosen = [row for row in rows if Load.parse(row.load).shape == shape]
        grid[0][column].set_title(_describe(Load.parse(chosen[0].load)), fontsize=10)
        for line, metric in enumerate(LATENCIES):
            for index, name in enumerate(names):
                points = [row for row in chosen if row.variant == name and metric in row.values]
                _draw_line(grid[line][column], points, metric, name, f"C{index}")
            grid[line][column].margins(0.15)
            grid[line][column].set(xlabel="output tokens per second", ylabel=LATENCIES[metric])
            grid[line][column].set(xlim=(0, None), ylim=(0, None))
    grid[0][0].legend()
    return _save(figure, path, f"{device}; medians; at the points: requests at once")


def _describe(load: Load) -> str:
    image = "" if load.image is None else f" and an image of {load.image[0]} x {load.image[1]}"
    return f"{load.prompt_tokens} tokens{image}, answer of {load.output_tokens}"


def _draw_line(axes: "Axes", points: Sequence[Row], metric: str, name: str, color: str) -> None:
    ordered = sorted(points, key=lambda row: Load.parse(row.load).concurrency)
    x, y = ([row.values[key] for row in ordered] for key in ("output tokens/s", metric))
    axes.plot(x, y, "o-", label=name, color=color)
    for row, place in zip(ordered, zip(x, y, strict=True), strict=True):
        text = str(Load.parse(row.load).concurrency)
        axes.annotate(text, place, xytext=(4, 4), textcoords="offset points", color=color, fontsize=8)


def _plot_memory(path: Path, rows: Sequence[Row], device: str) -> Path:
    from matplotlib import pyplot

    names = list(dict.fromkeys(row.variant for row in rows))
    first = {name: next(row for row in rows if row.variant == name).values for name in names}
    on_gpu = any(row.values["device_mib"] for row in rows)
    bars = {key: label for key, label in (DEVICE_BARS if on_gpu else BARS).items() if key in first[names[0]]}
    figure, axes = pyplot.subplots(figsize=(2 + 1.6 * len(names), 4.5))
    width = 0.8 / len(bars)
    for index, (column, label) in enumerate(bars.items()):
        places = [place + width * (index - (len(bars) - 1) / 2) for place in range(len(names))]
        drawn = axes.bar(places, [first[name][column] for name in names], 0.92 * width, label=label)
        axes.bar_label(drawn, fmt="%.0f", fontsize=7)
    axes.set_xticks(range(len(names)), names)
    axes.set_ylabel("MiB")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(bars), fontsize=8)
    return _save(figure, path, device)


def _save(figure: Any, path: Path, title: str) -> Path:
    from matplotlib import pyplot

    figure.suptitle(title, fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)
    return path
