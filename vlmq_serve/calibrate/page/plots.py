"""The plots of a run, each as SVG text; a plot for which the run has no figures is None."""

import io
from collections.abc import Sequence
from math import log10
from typing import TYPE_CHECKING, Any

from vlmq_serve.calibrate.metrics import ALL
from vlmq_serve.calibrate.page.read import RunRecord, number
from vlmq_serve.calibrate.samples import MODALITIES
from vlmq_serve.format.errors import VLMQError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {"vision": "#2a78d6", "prompt": "#eb6834", "answer": "#1baf7a", ALL: "#52514e"}
_INK, _GRID = "#0b0b0b", "#e1e0d9"


def new_figure(width: float, height: float, columns: int = 1, share: bool = True) -> tuple["Figure", list["Axes"]]:
    """A figure with `columns` panels (of one y-axis where they `share`), light grid, no box."""
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError:
        raise VLMQError("matplotlib: package not installed; pip install 'vlmq-serve[bench]'") from None
    with rc_context({"font.size": 9, "svg.fonttype": "none", "text.color": _INK}):
        figure = Figure(figsize=(width, height), layout="constrained")
        panels = list(figure.subplots(1, columns, squeeze=False, sharey=share)[0])
    for panel in panels:
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(color=_GRID, linewidth=0.6)
        panel.set_axisbelow(True)
    return figure, panels


def svg(figure: "Figure") -> str:
    """The figure as an `<svg>` element without the XML head, the same for the same figure."""
    from matplotlib import rc_context

    text = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "vlmq"}):
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    content = text.getvalue()
    return content[content.index("<svg") :]


def layer_errors(record: RunRecord) -> str | None:
    """Relative error of each layer's output by modality."""
    lines = {name: [number(row[f"error_{name}"]) for row in record.layers] for name in (*MODALITIES, ALL)}
    if not any(value is not None for value in lines[ALL]):
        return None
    figure, (panel,) = new_figure(7, 3)
    for name, values in lines.items():
        _line(panel, values, COLOURS[name], name)
    panel.set(xlabel="decoder layer", ylabel="relative squared error", yscale="log")
    figure.legend(frameon=False, ncols=4, loc="outside upper left")
    return svg(figure)


def linear_errors(record: RunRecord) -> str | None:
    """Every linear as a cell: its output error, or that of its weight where no data was seen."""
    column = f"error_{ALL}" if any(row[f"error_{ALL}"] for row in record.decoder) else "weight_error"
    table = [[log10(max(v or 1e-12, 1e-12)) for v in record.series(kind, column)] for kind in record.kinds]
    if not table or len({len(row) for row in table}) != 1:
        return None
    figure, (panel,) = new_figure(7, 0.8 + 0.32 * len(table))
    panel.grid(False)
    shown = panel.imshow(table, aspect="auto", cmap="Blues")
    panel.set_yticks(range(len(table)), record.kinds)
    panel.set_xlabel("decoder layer")
    whole_ticks(panel, len(table[0]))
    label = "log10 of the weights' error" if column == "weight_error" else "log10 of the output error"
    figure.colorbar(shown, ax=panel, label=label)
    return svg(figure)


def importance(record: RunRecord) -> str | None:
    """Mean token weight by modality, a panel per weighted linear."""
    kinds = [kind for kind in record.kinds if any(v is not None for v in record.series(kind, "importance_vision"))]
    if not kinds:
        return None
    figure, panels = new_figure(max(2.2 * len(kinds), 4), 2.6, len(kinds))
    for panel, kind in zip(panels, kinds, strict=True):
        for name in MODALITIES:
            _line(panel, record.series(kind, f"importance_{name}"), COLOURS[name], name)
        panel.axhline(1, color=COLOURS[ALL], linewidth=0.8, linestyle="--")
        panel.set(xlabel="decoder layer", yscale="log")
        panel.set_title(kind, fontsize=10)
    panels[0].set_ylabel("mean token weight")
    figure.legend(*panels[0].get_legend_handles_labels(), frameon=False, ncols=3, loc="outside upper left")
    return svg(figure)


def effective_tokens(record: RunRecord) -> str | None:
    """How many equally weighted tokens the weights of each linear amount to."""
    lines = {kind: record.series(kind, "effective_tokens") for kind in record.kinds}
    lines = {kind: values for kind, values in lines.items() if any(v is not None for v in values)}
    tokens = record.run.get("data", {}).get("tokens", {})
    if not lines:
        return None
    figure, (panel,) = new_figure(7, 2.6)
    palette = ("#2a78d6", "#eb6834", "#1baf7a", "#eda100", "#e87ba4", "#008300", "#4a3aa7")
    for (kind, values), colour in zip(lines.items(), palette, strict=False):
        _line(panel, values, colour, kind)
    if tokens:
        panel.axhline(sum(tokens.values()), color=COLOURS[ALL], linewidth=0.8, linestyle="--", label="all tokens")
    panel.set(xlabel="decoder layer", ylabel="effective tokens", yscale="log")
    figure.legend(frameon=False, ncols=5, loc="outside upper left")
    return svg(figure)


def cost(record: RunRecord) -> str:
    """Seconds of each layer, and the process's highest memory when it was done."""
    figure, panels = new_figure(7, 2.4, 2, share=False)
    for panel, column, label in zip(
        panels, ("seconds", "peak_memory_mib"), ("seconds per layer", "peak memory, MiB"), strict=True
    ):
        values = [number(row[column]) or 0.0 for row in record.layers]
        panel.bar(range(len(values)), values, color=COLOURS["vision"])
        panel.set_xlabel("decoder layer")
        panel.set_title(label, fontsize=10)
        whole_ticks(panel, len(values))
    return svg(figure)


def sizes(record: RunRecord) -> str | None:
    """The model before and after, in MiB."""
    if not record.sizes:
        return None
    figure, (panel,) = new_figure(7, 1.6)
    panel.barh(["before"], [record.run["bytes_before"] / 2**20], color="#b9b8b2", height=0.55)
    left = 0.0
    for (name, count), colour in zip(record.sizes.items(), ("#2a78d6", "#eb6834", "#eda100", "#b9b8b2"), strict=True):
        panel.barh(["after"], [count / 2**20], left=left, color=colour, label=name, height=0.55)
        left += count / 2**20
    panel.invert_yaxis()
    panel.set_xlabel("MiB")
    figure.legend(frameon=False, ncols=4, loc="outside upper left")
    return svg(figure)


def whole_ticks(panel: "Axes", count: int) -> None:
    """Layer numbers as ticks: all of few, every nth of many."""
    panel.set_xticks(range(0, count, max(count // 10, 1)))


def _line(panel: "Axes", values: Sequence[float | None], colour: str, label: str) -> None:
    shown: list[Any] = [float("nan") if value is None or value <= 0 else value for value in values]
    panel.plot(range(len(shown)), shown, color=colour, label=label, linewidth=1.8, marker="o", markersize=3.5)
    whole_ticks(panel, len(shown))
