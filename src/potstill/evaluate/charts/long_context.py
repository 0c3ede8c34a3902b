"""Draws how models use a long context as a PNG file: bits per byte by position, and hits of the needle probe."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from potstill.evaluate.charts.style import COLORS, DPI, INK, LIGHT_INK, TEXT, style_panel

Table = Mapping[str, Sequence[Mapping[str, Any]]]  # rows of each model
CHANCE = 1 / 8  # of the needle probe


def draw_long_context(positions: Table, needle: Table, path: Path) -> None:
    """Write `path` with a panel for each table that has rows. Both axes of length are logarithmic.

    `positions` has `start`, `stop` and `bits_per_byte`; `needle` has `length`, `depth` and `accuracy`, of which the
    chart shows the mean over depths.
    """
    tables = [(table, draw) for table, draw in ((positions, _draw_positions), (needle, _draw_needle)) if table]
    figure = Figure(figsize=(6.8 * len(tables), 4.4), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(tables), squeeze=False)[0]
    for panel, (table, draw) in zip(panels, tables, strict=True):
        style_panel(panel)
        ticks = draw(panel, table)
        panel.set_xscale("log")
        panel.xaxis.set_major_locator(FixedLocator(sorted(ticks)))
        panel.xaxis.set_minor_locator(NullLocator())
        panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        panel.tick_params(axis="x", labelrotation=30)
        panel.legend(frameon=False, fontsize=TEXT, labelcolor=INK)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI)


def _draw_positions(panel: Axes, table: Table) -> set[float]:
    """A line for each model over the ends of the ranges, with the intervals as bands."""
    for number, (name, rows) in enumerate(table.items()):
        stops, color = [row["stop"] for row in rows], COLORS[number % len(COLORS)]
        panel.plot(stops, [row["bits_per_byte"] for row in rows], "o-", color=color, ms=4, linewidth=1.8, label=name)
        if all("low" in row for row in rows):
            low, high = ([row[bound] for row in rows] for bound in ("low", "high"))
            panel.fill_between(stops, low, high, color=color, alpha=0.12, linewidth=0)
    panel.set_xlabel("position (tokens before the end of the range)", color=INK, fontsize=TEXT)
    panel.set_ylabel("bits per byte, lower is better", color=INK, fontsize=TEXT)
    return {float(row["stop"]) for rows in table.values() for row in rows}


def _draw_needle(panel: Axes, table: Table) -> set[float]:
    """A line for each model over the lengths of the texts, and one for a guess."""
    for number, (name, rows) in enumerate(table.items()):
        lengths = sorted({row["length"] for row in rows})
        groups = [[row["accuracy"] for row in rows if row["length"] == length] for length in lengths]
        means = [sum(group) / len(group) for group in groups]
        panel.plot(lengths, means, "o-", color=COLORS[number % len(COLORS)], ms=4, linewidth=1.8, label=name)
    panel.axhline(CHANCE, color=LIGHT_INK, linewidth=1, linestyle="--", label="chance")
    panel.set_ylim(-0.03, 1.03)
    panel.set_xlabel("length of the text (tokens)", color=INK, fontsize=TEXT)
    panel.set_ylabel("needles found, mean over depths", color=INK, fontsize=TEXT)
    return {float(row["length"]) for rows in table.values() for row in rows}
