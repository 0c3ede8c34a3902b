"""Draws methods with several seeds: a dot for each seed, a larger one for their mean, a panel for each measure.

Models that were not trained with seeds, such as the teacher, are gray squares above the methods.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from textwrap import fill
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from potstill.core.errors import DataError
from potstill.core.measure import Measure
from potstill.core.measure_table import MEASURES, TABLE_QUALITIES
from potstill.evaluate.charts.style import ACCENT, DPI, INK, LIGHT_INK, SMALL, TEXT, add_title, style_panel

MethodMeasures = Mapping[str, Sequence[Measure]]  # of one method: for each name, the measure of every seed
PANEL_WIDTH, ROW_HEIGHT = 3.4, 0.42  # inches: width of a panel, height of a method
NUM_COLUMNS = 2  # panels in a row
LABEL_WIDTH = 20  # characters; a longer name continues on the next line
SEED_SHIFT = 0.24  # rows below the mean, so that neither covers the other
REACH = 2.0  # a baseline farther than this many spans of the methods stands at the edge, with its value


def draw_dots(
    methods: Mapping[str, MethodMeasures],
    path: Path,
    *,
    baselines: Mapping[str, Mapping[str, Measure]] | None = None,
    title: str = "",
    caption: str = "",
) -> None:
    """Write `path`, a PNG with a panel for each quality that all `methods` have.

    Raises: DataError if they share none.
    """
    baselines = baselines or {}
    names = [name for name in TABLE_QUALITIES if all(name in measures for measures in methods.values())]
    if not names or not methods:
        raise DataError(f"no quality was measured for all of {len(methods)} methods, so there is nothing to draw")
    num_columns = min(len(names), NUM_COLUMNS)
    num_rows = -(-len(names) // num_columns)
    labels = [_wrap_label(label) for label in (*baselines, *methods)]
    num_lines = max(3, sum(1 + label.count("\n") / 2 for label in labels))
    size = (2.0 + PANEL_WIDTH * num_columns, 0.9 + num_rows * (1.0 + ROW_HEIGHT * num_lines))
    figure = Figure(figsize=size, dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(num_rows, num_columns, sharey=True, squeeze=False).flatten()
    for panel in panels[len(names) :]:
        panel.set_visible(False)
    for panel, name in zip(panels, names, strict=False):
        style_panel(panel)
        panel.spines["left"].set_visible(False)
        panel.tick_params(axis="y", labelcolor=INK)
        _draw_panel(panel, [measures[name] for measures in methods.values()], first_row=len(baselines))
        _draw_baselines(panel, [measures.get(name) for measures in baselines.values()])
        panel.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
        panel.ticklabel_format(axis="x", useOffset=False)
        panel.set_xlabel(f"{MEASURES[name].title},\n{MEASURES[name].better} is better", color=INK, fontsize=TEXT)
    panels[0].set_yticks(range(len(labels)), labels)
    panels[0].set_ylim(len(labels) - 0.4, -0.6)  # so that the first one is at the top
    add_title(figure, title)
    if caption:
        figure.supxlabel(fill(caption, round(13 * size[0])), x=0.012, ha="left", fontsize=SMALL, color=LIGHT_INK)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI)


def _wrap_label(label: str) -> str:
    """A sum of objectives breaks after a plus, any other long name at a space or an underscore."""
    pieces = label.replace("+", "+ ").split(" ") if "+" in label else label.replace("_", "_ ").split(" ")
    lines = [pieces[0]]
    for piece in pieces[1:]:
        gap = "" if lines[-1].endswith(("+", "_")) else " "
        if len(lines[-1] + gap + piece) <= LABEL_WIDTH:
            lines[-1] += gap + piece
        else:
            lines.append(piece)
    return "\n".join(lines)


def _draw_panel(panel: Axes, rows: Sequence[Sequence[Measure]], *, first_row: int) -> None:
    """Draw a row for each method: its seeds, their mean, and the mean interval over documents; set the limits."""
    bounds: list[float] = []
    for row, measures in enumerate(rows, first_row):
        values = [measure.value for measure in measures]
        low = fmean(measure.value if measure.low is None else measure.low for measure in measures)
        high = fmean(measure.value if measure.high is None else measure.high for measure in measures)
        bounds += [*values, low, high]
        panel.hlines(row, low, high, color=ACCENT, alpha=0.35, linewidth=3, zorder=2)
        seed_rows = [row + SEED_SHIFT] * len(values)
        panel.plot(values, seed_rows, "o", ms=5.5, markerfacecolor="white", markeredgecolor=ACCENT, zorder=3)
        panel.plot(fmean(values), row, "o", ms=9, color=ACCENT, zorder=4)
    span = (max(bounds) - min(bounds)) or abs(bounds[0]) or 1.0
    panel.set_xlim(min(bounds) - 0.12 * span, max(bounds) + 0.12 * span)


def _draw_baselines(panel: Axes, measures: Sequence[Measure | None]) -> None:
    """Draw a row for each baseline; a far one stands at the edge with its value, so that the methods stay apart."""
    left, right = panel.get_xlim()
    span = right - left
    near = [m for m in measures if m is not None and left - REACH * span < m.value < right + REACH * span]
    ends = [end for m in near for end in (m.value, m.low, m.high) if end is not None]
    left, right = min([left, *(end - 0.06 * span for end in ends)]), max([right, *(end + 0.06 * span for end in ends)])
    panel.set_xlim(left, right)
    for row, measure in enumerate(measures):
        if measure is None:
            continue
        if left <= measure.value <= right:
            if measure.low is not None and measure.high is not None:
                panel.hlines(row, measure.low, measure.high, color=LIGHT_INK, alpha=0.35, linewidth=3, zorder=2)
            panel.plot(measure.value, row, "s", ms=7, color=LIGHT_INK, zorder=4)
            continue
        text = MEASURES[measure.name].format(measure.value)
        style: dict[str, Any] = {"va": "center", "fontsize": TEXT, "color": LIGHT_INK}
        if measure.value > right:
            panel.text(right, row, f"{text} ▸", ha="right", **style)
        else:
            panel.text(left, row, f"◂ {text}", ha="left", **style)
