"""Draws the frontier as a PNG file: one quality against one or more costs."""

import math
import re
from collections.abc import Callable, Sequence
from itertools import pairwise, zip_longest
from pathlib import Path
from textwrap import fill

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patheffects import Normal, Stroke
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from potstill.core.errors import DataError
from potstill.core.measure import Measure
from potstill.evaluate.charts.frontier import (
    Point,
    choose_quality,
    find_dominated,
    format_value,
    get_axes,
    is_logarithmic,
    name_axis,
    to_display_unit,
)
from potstill.evaluate.charts.label_placement import Box, Position, nearest_edge, needs_leader_line, place_labels
from potstill.evaluate.charts.style import ACCENT, DPI, GRAY, INK, LIGHT_INK, SMALL, TEXT, add_title, style_panel

CAPTION = (
    "Hollow: another model is at least as good and as cheap. Bars: 95 % intervals; for speed the range of the runs."
)
BEND = 0.22  # curvature of the arrows from parent to child
TENTHS = tuple(n / 10 for n in range(10, 100))
FIFTHS = (1, 1.2, 1.4, 1.6, 1.8, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 8, 9)
TICK_DIGITS = ((1,), (1, 3), (1, 2, 5), (1, 2, 3, 5, 7), (1, 1.5, 2, 2.5, 3, 4, 5, 6, 8), FIFTHS, TENTHS)
MAX_TICKS = 12  # of one axis


def draw_frontier(
    points: Sequence[Point], path: Path, *, costs: Sequence[str] = (), quality: str | None = None, title: str = ""
) -> None:
    """Write `path`, a PNG of `quality` against each of `costs`, by default parameters.

    By default the quality is the KL to the teacher, where it was measured, else agreement or bits per byte.

    Raises: DataError if one of them was not measured.
    """
    available_costs, qualities = get_axes(points)
    quality = quality or choose_quality(points, qualities)
    costs = costs or ["parameters" if "parameters" in available_costs else available_costs[0]]
    if missing_measures := [name for name in (*costs, quality) if name not in (*available_costs, *qualities)]:
        raise DataError(
            f"no model has the measure {', '.join(missing_measures)}; choose from "
            f"{', '.join((*qualities, *available_costs))}"
        )
    figure = Figure(figsize=(6.4 * len(costs), 4.8), dpi=DPI, layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08))
    canvas = FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(costs), sharey=True, squeeze=False)[0]
    curves = [_draw_panel(panel, points, cost, quality) for panel, cost in zip(panels, costs, strict=True)]
    add_title(figure, title)
    panels[0].set_ylabel(_name_axis(points, quality), color=INK, fontsize=TEXT)
    figure.supxlabel(fill(CAPTION, 84 * len(costs)), x=0.012, ha="left", fontsize=SMALL, color=LIGHT_INK)
    canvas.draw()  # fixes the layout, on which positions in pixels depend
    figure.set_layout_engine("none")
    for panel, cost, panel_curves in zip(panels, costs, curves, strict=True):
        _label_points(
            panel,
            canvas,
            [point for point in points if point.has_measures(cost, quality)],
            (cost, quality),
            panel_curves,
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI)


PageCurve = Callable[
    [Axes], list[Position]
]  # gives the positions of a drawn curve on the page, once the layout is fixed


def _draw_panel(panel: Axes, points: Sequence[Point], cost: str, quality: str) -> list[PageCurve]:
    drawn_points = [point for point in points if point.has_measures(cost, quality)]
    dominated_by_name = dict(zip((p.name for p in points), find_dominated(points, cost, quality), strict=True))
    _style_panel(panel, drawn_points, cost, quality)
    curves = [_draw_frontier_line(panel, [p for p in drawn_points if not dominated_by_name[p.name]], cost, quality)]
    curves += _draw_lineage(panel, drawn_points, cost, quality)
    for point in drawn_points:
        color = GRAY if dominated_by_name[point.name] else ACCENT
        x, y = _get_position(point, cost, quality)
        x_error, y_error = _get_error_bars(point.measures[cost]), _get_error_bars(point.measures[quality])
        panel.errorbar(x, y, y_error, x_error, fmt="none", ecolor=color, elinewidth=1.3, capsize=3, zorder=3)
        face_color, zorder = ("white", 4) if dominated_by_name[point.name] else (color, 5)
        panel.plot(
            x, y, "o", ms=7.5, markerfacecolor=face_color, markeredgecolor=color, markeredgewidth=1.8, zorder=zorder
        )
    return curves


def _style_panel(panel: Axes, drawn_points: Sequence[Point], cost: str, quality: str) -> None:
    style_panel(panel)
    panel.set_xlabel(_name_axis(drawn_points, cost), color=INK, fontsize=TEXT)
    for axis, name in (("x", cost), ("y", quality)):
        bounds = [v for point in drawn_points for v in _get_bounds(point.measures[name])]
        _set_scale(panel, axis, bounds, name)


def _name_axis(points: Sequence[Point], name: str) -> str:
    bounds = [bound for point in points if name in point.measures for bound in _get_bounds(point.measures[name])]
    return name_axis(name, bounds)


def _set_scale(panel: Axes, axis: str, bounds: Sequence[float], name: str) -> None:
    """Set limits with room for labels, and a logarithmic scale where values differ by more than a factor of two."""
    low, high = min(bounds, default=0.0), max(bounds, default=1.0)
    ticks = panel.xaxis if axis == "x" else panel.yaxis
    set_limits = panel.set_xlim if axis == "x" else panel.set_ylim
    margin = 0.18 if axis == "x" else 0.14
    if is_logarithmic(name, bounds):
        (panel.set_xscale if axis == "x" else panel.set_yscale)("log")
        factor = (high / low) ** margin
        set_limits(low / factor, high * factor)
        ticks.set_major_locator(FixedLocator(log_ticks(low / factor, high * factor)))
        ticks.set_minor_locator(NullLocator())
    else:
        span = (high - low) or abs(high) or 1.0
        bottom, top = low - margin * span, high + margin * span
        if low >= 0:
            bottom = max(bottom, -0.06 * (top - low))  # little empty space below zero
        set_limits(bottom, top)
        ticks.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    ticks.set_major_formatter(FuncFormatter(lambda value, _: _format_tick(value, name)))


def log_ticks(low: float, high: float) -> list[float]:
    """Round numbers between two positive ones: at least four of the fewest digits possible, none too close together."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits in TICK_DIGITS:
        candidates = [digit * 10.0**power for power in powers for digit in digits if low <= digit * 10.0**power <= high]
        if len(candidates) >= 4:
            break
    ticks: list[float] = []
    for tick in sorted(candidates):
        if not ticks or math.log(tick / ticks[-1]) >= math.log(high / low) / MAX_TICKS:
            ticks.append(tick)
    return ticks


def _format_tick(value: float, name: str) -> str:
    if name == "parameters":
        return re.sub(r"\.0+(?=[kMB])", "", format_value(value, name)) if value else "0"
    return f"{value:,.6g}" if abs(value) < 1e4 else f"{value:,.0f}"


def _draw_frontier_line(panel: Axes, frontier_points: Sequence[Point], cost: str, quality: str) -> PageCurve:
    """Draw the frontier as a staircase: the best quality at each cost."""
    frontier_points = sorted(
        frontier_points, key=lambda p: p.measures[cost].value * (-1 if p.measures[cost].better == "higher" else 1)
    )
    positions = [_get_position(point, cost, quality) for point in frontier_points]
    corners = [(x, y) for (_, y), (x, _) in pairwise(positions)]
    steps = [position for pair in zip_longest(positions, corners) for position in pair if position is not None]
    panel.plot(*zip(*steps, strict=True), color=ACCENT, alpha=0.35, linewidth=2, zorder=2)
    return lambda final_panel: [_to_page(final_panel, *step) for step in steps]


def _draw_lineage(panel: Axes, drawn_points: Sequence[Point], cost: str, quality: str) -> list[PageCurve]:
    """Draw a thin curved arrow from each model to its children."""
    positions = {point.name: _get_position(point, cost, quality) for point in drawn_points}
    style = {"arrowstyle": "-|>", "color": GRAY, "linewidth": 0.9, "shrinkA": 7, "shrinkB": 7, "mutation_scale": 9}
    arc_style = {"connectionstyle": f"arc3,rad={BEND}", "linestyle": (0, (4, 3))}
    curves: list[PageCurve] = []
    for point in drawn_points:
        if point.parent in positions and point.parent != point.name:
            parent_position, child_position = positions[point.parent], positions[point.name]
            panel.annotate("", child_position, parent_position, arrowprops=style | arc_style, zorder=1)
            curves.append(_make_arc(parent_position, child_position))
    return curves


def _make_arc(start: Position, end: Position) -> PageCurve:
    return lambda final_panel: _bend_arc(_to_page(final_panel, *start), _to_page(final_panel, *end))


def _bend_arc(start: Position, end: Position, *, num_pieces: int = 12) -> list[Position]:
    """The arrow of `_draw_lineage` as short line segments: a quadratic Bézier curve like matplotlib's arc3."""
    dx, dy = end[0] - start[0], end[1] - start[1]
    control = (start[0] + end[0]) / 2 + BEND * dy, (start[1] + end[1]) / 2 - BEND * dx
    fractions = [n / num_pieces for n in range(num_pieces + 1)]
    x, y = ([(1 - t) ** 2 * start[i] + 2 * t * (1 - t) * control[i] + t**2 * end[i] for t in fractions] for i in (0, 1))
    return list(zip(x, y, strict=True))


def _label_points(
    panel: Axes,
    canvas: FigureCanvasAgg,
    drawn_points: Sequence[Point],
    measure_names: tuple[str, str],
    curves: Sequence[PageCurve],
) -> None:
    """Write each model's name near its point, clear of the others, with a leader line where it is far away."""
    anchors = [_to_page(panel, *_get_position(point, *measure_names)) for point in drawn_points]
    halo = [Stroke(linewidth=3, foreground="white"), Normal()]
    texts = [panel.text(0, 0, p.name, fontsize=TEXT, color=INK, zorder=7, path_effects=halo) for p in drawn_points]
    extents = [text.get_window_extent(canvas.get_renderer()) for text in texts]
    boxes = place_labels(
        anchors,
        [(float(extent.width) * 72 / DPI + 3, float(extent.height) * 72 / DPI) for extent in extents],
        bounds=_get_frame_box(panel),
        marks=[_get_mark_boxes(panel, point, *measure_names) for point in drawn_points],
        curves=[curve(panel) for curve in curves],
    )
    to_data = panel.transData.inverted().transform
    for text, anchor, box in zip(texts, anchors, boxes, strict=True):
        x, y = to_data(((box[0] + 1.5) * DPI / 72, (box[1] + box[3]) / 2 * DPI / 72))
        text.set_position((float(x), float(y)))
        text.set_verticalalignment("center")
        if needs_leader_line(anchor, end := nearest_edge(box, anchor)):
            line = to_data([[v * DPI / 72 for v in position] for position in (anchor, end)])
            panel.plot(line[:, 0], line[:, 1], color=LIGHT_INK, linewidth=0.7, zorder=3, scalex=False, scaley=False)


def _get_frame_box(panel: Axes) -> Box:
    left, bottom, right, top = (float(v) * 72 / DPI for v in panel.get_window_extent().extents)
    return left, bottom, right, top


def _to_page(panel: Axes, x: float, y: float) -> Position:
    """The position of a value, in points of the printed page."""
    page_x, page_y = panel.transData.transform((x, y)) * 72 / DPI
    return float(page_x), float(page_y)


def _get_mark_boxes(panel: Axes, point: Point, cost: str, quality: str) -> list[Box]:
    """The boxes on the page that a point and its error bars cover."""
    x, y = _get_position(point, cost, quality)
    x_bounds, y_bounds = _get_bounds(point.measures[cost]), _get_bounds(point.measures[quality])
    (left, middle), (right, _) = _to_page(panel, x_bounds[0], y), _to_page(panel, x_bounds[-1], y)
    (center, bottom), (_, top) = _to_page(panel, x, y_bounds[0]), _to_page(panel, x, y_bounds[-1])
    return [
        (center - 5, middle - 5, center + 5, middle + 5),
        (left - 1, middle - 3, right + 1, middle + 3),
        (center - 3, bottom - 1, center + 3, top + 1),
    ]


def _get_position(point: Point, cost: str, quality: str) -> tuple[float, float]:
    return to_display_unit(point.measures[cost]), to_display_unit(point.measures[quality])


def _get_bounds(measure: Measure) -> list[float]:
    """Low, value and high of a measure in increasing order, in the unit of the chart."""
    values = [measure.value, *(v for v in (measure.low, measure.high) if v is not None)]
    return sorted(to_display_unit(measure, value) for value in values)


def _get_error_bars(measure: Measure) -> list[list[float]]:
    bounds, value = _get_bounds(measure), to_display_unit(measure)
    return [[value - bounds[0]], [bounds[-1] - value]]
