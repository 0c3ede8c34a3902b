"""Draws methods with several seeds: a dot for each seed, a larger one for their mean, a panel for each measure."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import fill

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from potstill.core.errors import DataError
from potstill.core.measure_table import MEASURES, TABLE_QUALITIES
from potstill.core.types import Measure
from potstill.evaluate.charts.plots import ACCENT, DPI, GRID, INK, LIGHT_INK

MethodMeasures = Mapping[str, Sequence[Measure]]  # of one method: for each name, the measure of every seed
PANEL_WIDTH, ROW_HEIGHT = 3.6, 0.34  # inches: width of a panel, height of a method
NUM_COLUMNS = 2  # panels in a row


def draw_dots(methods: Mapping[str, MethodMeasures], path: Path, *, title: str = "", caption: str = "") -> None:
    """Write `path`, a PNG with a panel for each quality that all `methods` have.

    Raises: DataError if they share none.
    """
    names = [name for name in TABLE_QUALITIES if all(name in measures for measures in methods.values())]
    if not names or not methods:
        raise DataError(f"no quality was measured for all of {len(methods)} methods, so there is nothing to draw")
    num_columns = min(len(names), NUM_COLUMNS)
    num_rows = -(-len(names) // num_columns)
    size = (1.6 + PANEL_WIDTH * num_columns, 0.6 + num_rows * (0.9 + ROW_HEIGHT * max(3, len(methods))))
    figure = Figure(figsize=size, dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(num_rows, num_columns, sharey=True, squeeze=False).flatten()
    for panel in panels[len(names) :]:
        panel.set_visible(False)
    for panel, name in zip(panels, names, strict=False):
        _draw_panel(panel, [measures[name] for measures in methods.values()])
        panel.set_xlabel(f"{MEASURES[name].title},\n{MEASURES[name].better} is better", color=INK)
    panels[0].set_yticks(range(len(methods)), list(methods))
    panels[0].set_ylim(len(methods) - 0.4, -0.6)  # so that the first method is at the top
    if title:
        figure.suptitle(title, x=0.012, ha="left", fontsize=12, fontweight="bold", color=INK)
    if caption:
        figure.supxlabel(fill(caption, round(14 * size[0])), x=0.012, ha="left", fontsize=8, color=LIGHT_INK)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI)


def _draw_panel(panel: Axes, rows: Sequence[Sequence[Measure]]) -> None:
    """Draw a row for each method: a line from its lowest to its highest seed, the seeds, and their mean."""
    panel.spines[["top", "right", "left"]].set_visible(False)
    panel.spines["bottom"].set_color(LIGHT_INK)
    panel.grid(color=GRID, linewidth=0.8)
    panel.set_axisbelow(True)
    panel.tick_params(colors=LIGHT_INK, labelsize=9, length=0)
    panel.tick_params(axis="y", labelcolor=INK)
    panel.margins(x=0.12)
    panel.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
    panel.ticklabel_format(axis="x", useOffset=False)
    for row, measures in enumerate(rows):
        values = [measure.value for measure in measures]
        panel.hlines(row, min(values), max(values), color=ACCENT, alpha=0.35, linewidth=2.5, zorder=2)
        panel.plot(values, [row] * len(values), "o", ms=5, markerfacecolor="white", markeredgecolor=ACCENT, zorder=3)
        panel.plot(sum(values) / len(values), row, "o", ms=8, color=ACCENT, zorder=4)
