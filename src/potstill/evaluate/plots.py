"""Pictures for READMEs and reports: the frontier and the curve of a training run, as PNG files."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from potstill.core.errors import DataError
from potstill.core.types import Measure
from potstill.evaluate.frontier import TITLES, Point, axes, dominated, shown, written
from potstill.evaluate.labels import Box, nearest_edge, place

INK, FAINT, GRID = "#1f2328", "#6e7781", "#e6e8eb"
ACCENT, DULL = "#0b6e99", "#9aa4ae"
COLOURS = ("#0b6e99", "#c8553d", "#588157", "#8e5ea2", "#b08900", "#6e7781")  # apart in hue and in lightness
DPI = 160


def draw_frontier(
    points: Sequence[Point], path: Path, *, costs: Sequence[str] = (), quality: str | None = None
) -> None:
    """`path` as a PNG of `quality` against each of `costs`, one panel each; by default parameters and decoding speed.

    Raises: DataError where these were not measured.
    """
    found_costs, qualities = axes(points)
    quality = quality or qualities[0]
    costs = costs or [c for c in ("parameters", "decode_tokens_per_second") if c in found_costs] or found_costs[:1]
    if absent := [name for name in (*costs, quality) if name not in (*found_costs, *qualities)]:
        raise DataError(f"no model has {', '.join(absent)} measured; there are {', '.join((*qualities, *found_costs))}")
    figure = Figure(figsize=(5.6 * len(costs), 4.4), dpi=DPI, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(costs), sharey=True, squeeze=False)[0]
    for panel, cost in zip(panels, costs, strict=True):
        _panel(panel, points, cost, quality)
    panels[0].set_ylabel(f"{TITLES[quality]}, {_better(points, quality)} is better", color=INK)
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.08)
    canvas.draw()  # the layout is settled; only now do places in pixels mean anything
    figure.set_layout_engine("none")
    for panel, cost in zip(panels, costs, strict=True):
        _name_points(panel, canvas, points, cost, quality)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI)


def _panel(panel: Axes, points: Sequence[Point], cost: str, quality: str) -> None:
    drawn = [point for point in points if point.at(cost, quality)]
    beaten = dict(zip((p.name for p in points), dominated(points, cost, quality), strict=True))
    _prepare(panel, drawn, cost, quality)
    _connect(panel, [p for p in drawn if not beaten[p.name]], cost, quality)
    _lineage(panel, drawn, cost, quality)
    for point in drawn:
        colour = DULL if beaten[point.name] else ACCENT
        x, y = _spot(point, cost, quality)
        spread = {"xerr": _error(point.measures[cost]), "yerr": _error(point.measures[quality])}
        panel.errorbar(x, y, **spread, fmt="none", ecolor=colour, elinewidth=1.3, capsize=3, zorder=3)
        face = "white" if beaten[point.name] else colour
        panel.plot(x, y, "o", markersize=8, markerfacecolor=face, markeredgecolor=colour, markeredgewidth=1.8, zorder=4)


def _prepare(panel: Axes, drawn: Sequence[Point], cost: str, quality: str) -> None:
    panel.spines[["top", "right"]].set_visible(False)
    panel.spines[["left", "bottom"]].set_color(FAINT)
    panel.grid(color=GRID, linewidth=0.8)
    panel.set_axisbelow(True)
    panel.tick_params(colors=FAINT, labelsize=9, length=0)
    panel.set_xlabel(f"{TITLES[cost]}, {_better(drawn, cost)} is better", color=INK)
    for axis, name in (("x", cost), ("y", quality)):
        bounds = [v for point in drawn for v in _bounds(point.measures[name])]
        _scale(panel, axis, bounds, name)


def _scale(panel: Axes, axis: str, bounds: Sequence[float], name: str) -> None:
    """Limits with room for names; logarithmic where values lie further apart than a factor of three."""
    low, high = min(bounds, default=0.0), max(bounds, default=1.0)
    ticks = panel.xaxis if axis == "x" else panel.yaxis
    set_limits = panel.set_xlim if axis == "x" else panel.set_ylim
    room = 0.22
    if low > 0 and high / low > 3 and name != "teacher_agreement":
        (panel.set_xscale if axis == "x" else panel.set_yscale)("log")
        factor = (high / low) ** room
        set_limits(low / factor, high * factor)
        ticks.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ticks.set_minor_formatter(NullFormatter())
        ticks.set_minor_locator(LogLocator(subs=()))
    else:
        span = (high - low) or abs(high) or 1.0
        bottom, top = low - room * span, high + room * span
        if low >= 0:
            bottom = max(bottom, -0.06 * (top - low))  # no empty room below zero
        set_limits(bottom, top)
        ticks.set_major_locator(MaxNLocator(5))
    ticks.set_major_formatter(FuncFormatter(lambda value, _: _tick(value, name)))


def _tick(value: float, name: str) -> str:
    if name == "parameters":
        return written(value, name).replace(".0 M", " M").replace(".00 B", " B") if value else "0"
    return f"{value:,.6g}" if abs(value) < 1e4 else f"{value:,.0f}"


def _connect(panel: Axes, best: Sequence[Point], cost: str, quality: str) -> None:
    """The frontier as a staircase: what one can have at most that cost."""
    best = sorted(best, key=lambda p: p.measures[cost].value * (-1 if p.measures[cost].better == "higher" else 1))
    x, y = [shown(p.measures[cost]) for p in best], [shown(p.measures[quality]) for p in best]
    panel.plot(x, y, drawstyle="steps-post", color=ACCENT, alpha=0.35, linewidth=2, zorder=2)


def _lineage(panel: Axes, drawn: Sequence[Point], cost: str, quality: str) -> None:
    """A thin bent arrow from each model to those made from it."""
    spots = {point.name: _spot(point, cost, quality) for point in drawn}
    for point in drawn:
        if point.parent not in spots or point.parent == point.name:
            continue
        style = {"arrowstyle": "-|>", "color": DULL, "linewidth": 0.9, "shrinkA": 7, "shrinkB": 7}
        bend = {"connectionstyle": "arc3,rad=0.22", "linestyle": (0, (4, 3)), "mutation_scale": 9}
        panel.annotate("", spots[point.name], spots[point.parent], arrowprops=style | bend, zorder=1)


def _name_points(panel: Axes, canvas: FigureCanvasAgg, points: Sequence[Point], cost: str, quality: str) -> None:
    """Each model's name beside its point, clear of the others, joined to it by a line where it had to move away."""
    drawn = [point for point in points if point.at(cost, quality)]
    at = panel.transData.transform
    anchors = [tuple(float(v) for v in at(_spot(point, cost, quality))) for point in drawn]
    texts = [panel.text(0, 0, point.name, fontsize=9.5, color=INK, zorder=5) for point in drawn]
    extents = [text.get_window_extent(canvas.get_renderer()) for text in texts]
    frame = panel.get_window_extent()
    boxes = place(
        [(x, y) for x, y in anchors],
        [(extent.width + 6, extent.height + 2) for extent in extents],
        inside=(frame.x0 + 2, frame.y0 + 2, frame.x1, frame.y1),
        obstacles=[box for point in drawn for box in _marks(panel, point, cost, quality)],
    )
    for text, anchor, box in zip(texts, anchors, boxes, strict=True):
        text.set_position(panel.transData.inverted().transform((box[0] + 3, (box[1] + box[3]) / 2)))
        text.set_verticalalignment("center_baseline")
        end = nearest_edge(box, (anchor[0], anchor[1]))
        if math.dist(end, anchor) > 20:
            line = panel.transData.inverted().transform([anchor, end])
            panel.plot(line[:, 0], line[:, 1], color=FAINT, linewidth=0.7, zorder=2, scalex=False, scaley=False)


def _marks(panel: Axes, point: Point, cost: str, quality: str) -> list[Box]:
    """The boxes in pixels that a point and its error bars cover."""
    (x, y), at = _spot(point, cost, quality), panel.transData.transform
    wide, tall = _bounds(point.measures[cost]), _bounds(point.measures[quality])
    (left, middle), (right, _) = at((wide[0], y)), at((wide[-1], y))
    (centre, bottom), (_, top) = at((x, tall[0])), at((x, tall[-1]))
    dot = 9 * DPI / 100
    return [
        (centre - dot / 2, middle - dot / 2, centre + dot / 2, middle + dot / 2),
        (left - 2, middle - 2, right + 2, middle + 2),
        (centre - 2, bottom - 2, centre + 2, top + 2),
    ]


def _spot(point: Point, cost: str, quality: str) -> tuple[float, float]:
    return shown(point.measures[cost]), shown(point.measures[quality])


def _bounds(measure: Measure) -> list[float]:
    """Lowest, own and highest value, in the unit that is shown."""
    values = [measure.value, *(v for v in (measure.low, measure.high) if v is not None)]
    return sorted(shown(measure, value) for value in values)


def _error(measure: Measure) -> list[list[float]]:
    bounds, value = _bounds(measure), shown(measure)
    return [[value - bounds[0]], [bounds[-1] - value]]


def _better(points: Sequence[Point], name: str) -> str:
    return next(point.measures[name].better for point in points if point.at(name))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl` that are whole; a run that was cut may leave half a last line.

    Raises: DataError where a line before the last is no JSON object.
    """
    lines = path.read_text(encoding="utf-8").splitlines()
    found: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise DataError(f"{path}, line {number} is no JSON: {error}") from error
        if not isinstance(entry, dict):
            raise DataError(f"{path}, line {number} is no JSON object but {line[:40]!r}")
        found.append(entry)
    return found


def draw_curve(metrics: Path, path: Path, *, terms: Sequence[str] = (), over: str = "tokens") -> None:
    """`path` as a PNG of the `terms` in a `metrics.jsonl` over the tokens seen; by default every `loss` and `eval` term.

    Raises: DataError where there is nothing to draw.
    """
    entries = [entry for entry in read_metrics(metrics) if over in entry]
    curves = {term: _curve(entries, term, over) for term in terms or _terms(entries, over)}
    curves = {term: curve for term, curve in curves.items() if curve}
    if not curves:
        raise DataError(f"{metrics} has no {' or '.join(terms) or 'term'} over {over} to draw")
    figure = Figure(figsize=(7.2, 3.9), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    panel = figure.subplots()
    panel.spines[["top", "right"]].set_visible(False)
    panel.spines[["left", "bottom"]].set_color(FAINT)
    panel.grid(color=GRID, linewidth=0.8)
    panel.tick_params(colors=FAINT, labelsize=9, length=0)
    for number, (term, curve) in enumerate(curves.items()):
        _draw_curve(panel, term, curve, COLOURS[number % len(COLOURS)])
    panel.set_xlabel(f"{over} seen", color=INK)
    panel.set_ylabel("per token, lower is better", color=INK)
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
    panel.legend(frameon=False, fontsize=9, labelcolor=INK)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI)


def _terms(entries: Sequence[Mapping[str, Any]], over: str) -> list[str]:
    named = {name: None for entry in entries for name in entry if name.startswith(("loss", "term", "eval"))}
    return [name for name in named if name != over]


def _curve(entries: Sequence[Mapping[str, Any]], term: str, over: str) -> list[tuple[float, float]]:
    pairs = ((entry[over], entry.get(term)) for entry in entries)
    return [(float(x), float(y)) for x, y in pairs if isinstance(y, int | float) and math.isfinite(y)]


def _draw_curve(panel: Axes, term: str, curve: Sequence[tuple[float, float]], colour: str) -> None:
    """Every value faintly, and their running mean; what was measured only now and then with its points marked."""
    x, y = zip(*curve, strict=True)
    if len(curve) < 40:
        panel.plot(x, y, "o-", color=colour, markersize=4, linewidth=1.6, label=term)
        return
    panel.plot(x, y, color=colour, alpha=0.25, linewidth=0.8)
    panel.plot(x, _smooth(y, share=0.04), color=colour, linewidth=1.8, label=term)


def _smooth(values: Sequence[float], *, share: float) -> list[float]:
    """An exponential mean over about `share` of the values, unbiased at the start."""
    decay = 1 - 1 / max(1.0, share * len(values))
    mean, weight, smoothed = 0.0, 0.0, []
    for value in values:
        mean, weight = decay * mean + (1 - decay) * value, decay * weight + (1 - decay)
        smoothed.append(mean / weight)
    return smoothed


def _short(value: float) -> str:
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g} {letter}"
    return f"{value:g}"
