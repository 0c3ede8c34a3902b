"""Pictures for READMEs and reports: the frontier and the curve of a training run, as PNG files."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise, zip_longest
from pathlib import Path
from textwrap import fill
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patheffects import Normal, Stroke
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from potstill.core.errors import DataError
from potstill.core.types import Measure
from potstill.evaluate.frontier import TITLES, Point, axes, dominated, shown, written
from potstill.evaluate.labels import Box, Spot, joined, nearest_edge, place

INK, FAINT, GRID = "#1f2328", "#6e7781", "#e6e8eb"
ACCENT, DULL = "#0b6e99", "#9aa4ae"
COLOURS = ("#0b6e99", "#c8553d", "#588157", "#8e5ea2", "#b08900", "#6e7781")  # apart in hue and in lightness
DPI = 160
CAPTION = (
    "Hollow: another model is at least as good and as cheap. Bars: 95 % intervals; for speed the range of the runs."
)
BEND = 0.22  # of the arrows of lineage
TENTHS = tuple(n / 10 for n in range(10, 100))
FIFTHS = (1, 1.2, 1.4, 1.6, 1.8, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 8, 9)
DIGITS = ((1,), (1, 3), (1, 2, 5), (1, 2, 3, 5, 7), (1, 1.5, 2, 2.5, 3, 4, 5, 6, 8), FIFTHS, TENTHS)
CROWD = 12  # ticks that an axis has room for
BOOKS = {"step", "tokens", "epoch", "learning_rate", "grad_norm", "num_input_tokens_seen"}  # logged, and no loss


def draw_frontier(
    points: Sequence[Point], path: Path, *, costs: Sequence[str] = (), quality: str | None = None, title: str = ""
) -> None:
    """`path` as a PNG of `quality` against each of `costs`, one panel each; by default parameters and decoding speed.

    Raises: DataError where these were not measured.
    """
    found_costs, qualities = axes(points)
    quality = quality or qualities[0]
    costs = costs or [c for c in ("parameters", "decode_tokens_per_second") if c in found_costs] or found_costs[:1]
    if absent := [name for name in (*costs, quality) if name not in (*found_costs, *qualities)]:
        raise DataError(f"no model has {', '.join(absent)} measured; there are {', '.join((*qualities, *found_costs))}")
    figure = Figure(figsize=(5.6 * len(costs), 4.4), dpi=DPI, layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08))
    canvas = FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(costs), sharey=True, squeeze=False)[0]
    curves = [_panel(panel, points, cost, quality) for panel, cost in zip(panels, costs, strict=True)]
    if title:
        figure.suptitle(title, x=0.012, ha="left", fontsize=12, fontweight="bold", color=INK)
    panels[0].set_ylabel(f"{TITLES[quality]}, {_better(points, quality)} is better", color=INK)
    figure.supxlabel(fill(CAPTION, 72 * len(costs)), x=0.012, ha="left", fontsize=8, color=FAINT)
    canvas.draw()  # the layout is settled; only now do places in pixels mean anything
    figure.set_layout_engine("none")
    for panel, cost, drawn in zip(panels, costs, curves, strict=True):
        _name_points(panel, canvas, [point for point in points if point.at(cost, quality)], (cost, quality), drawn)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI)


Curve = Callable[[Axes], list[Spot]]  # what was drawn, as places on the page, once the layout is settled


def _panel(panel: Axes, points: Sequence[Point], cost: str, quality: str) -> list[Curve]:
    drawn = [point for point in points if point.at(cost, quality)]
    beaten = dict(zip((p.name for p in points), dominated(points, cost, quality), strict=True))
    _prepare(panel, drawn, cost, quality)
    curves = [_connect(panel, [p for p in drawn if not beaten[p.name]], cost, quality)]
    curves += _lineage(panel, drawn, cost, quality)
    for point in drawn:
        colour = DULL if beaten[point.name] else ACCENT
        x, y = _spot(point, cost, quality)
        wide, tall = _error(point.measures[cost]), _error(point.measures[quality])
        panel.errorbar(x, y, tall, wide, fmt="none", ecolor=colour, elinewidth=1.3, capsize=3, zorder=3)
        face, above = ("white", 4) if beaten[point.name] else (colour, 5)
        panel.plot(x, y, "o", ms=7.5, markerfacecolor=face, markeredgecolor=colour, markeredgewidth=1.8, zorder=above)
    return curves


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
    """Limits with room for names; logarithmic where values lie further apart than a factor of two."""
    low, high = min(bounds, default=0.0), max(bounds, default=1.0)
    ticks = panel.xaxis if axis == "x" else panel.yaxis
    set_limits = panel.set_xlim if axis == "x" else panel.set_ylim
    room = 0.18 if axis == "x" else 0.14
    if low > 0 and high / low > 2 and name != "teacher_agreement":
        (panel.set_xscale if axis == "x" else panel.set_yscale)("log")
        factor = (high / low) ** room
        set_limits(low / factor, high * factor)
        ticks.set_major_locator(FixedLocator(log_ticks(low / factor, high * factor)))
        ticks.set_minor_locator(NullLocator())
    else:
        span = (high - low) or abs(high) or 1.0
        bottom, top = low - room * span, high + room * span
        if low >= 0:
            bottom = max(bottom, -0.06 * (top - low))  # no empty room below zero
        set_limits(bottom, top)
        ticks.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    ticks.set_major_formatter(FuncFormatter(lambda value, _: _tick(value, name)))


def log_ticks(low: float, high: float) -> list[float]:
    """Round numbers between two positive ones, of the fewest digits of which at least four fit, and none too near."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits in DIGITS:
        found = [digit * 10.0**power for power in powers for digit in digits if low <= digit * 10.0**power <= high]
        if len(found) >= 4:
            break
    kept: list[float] = []
    for tick in sorted(found):
        if not kept or math.log(tick / kept[-1]) >= math.log(high / low) / CROWD:
            kept.append(tick)
    return kept


def _tick(value: float, name: str) -> str:
    if name == "parameters":
        return written(value, name).replace(".0 M", " M").replace(".00 B", " B") if value else "0"
    return f"{value:,.6g}" if abs(value) < 1e4 else f"{value:,.0f}"


def _connect(panel: Axes, best: Sequence[Point], cost: str, quality: str) -> Curve:
    """The frontier as a staircase: what one can have at most that cost."""
    best = sorted(best, key=lambda p: p.measures[cost].value * (-1 if p.measures[cost].better == "higher" else 1))
    spots = [_spot(point, cost, quality) for point in best]
    corners = [(x, y) for (_, y), (x, _) in pairwise(spots)]
    steps = [spot for pair in zip_longest(spots, corners) for spot in pair if spot is not None]
    panel.plot(*zip(*steps, strict=True), color=ACCENT, alpha=0.35, linewidth=2, zorder=2)
    return lambda settled: [_on_page(settled, *step) for step in steps]


def _lineage(panel: Axes, drawn: Sequence[Point], cost: str, quality: str) -> list[Curve]:
    """A thin bent arrow from each model to those made from it."""
    spots = {point.name: _spot(point, cost, quality) for point in drawn}
    style = {"arrowstyle": "-|>", "color": DULL, "linewidth": 0.9, "shrinkA": 7, "shrinkB": 7, "mutation_scale": 9}
    bend = {"connectionstyle": f"arc3,rad={BEND}", "linestyle": (0, (4, 3))}
    curves: list[Curve] = []
    for point in drawn:
        if point.parent in spots and point.parent != point.name:
            old, new = spots[point.parent], spots[point.name]
            panel.annotate("", new, old, arrowprops=style | bend, zorder=1)
            curves.append(_arc(old, new))
    return curves


def _arc(old: Spot, new: Spot) -> Curve:
    return lambda settled: _bent(_on_page(settled, *old), _on_page(settled, *new))


def _bent(old: Spot, new: Spot, *, pieces: int = 12) -> list[Spot]:
    """The arc of `_lineage` as a line of short pieces: a quadratic Bézier curve, bent as matplotlib's arc3 is."""
    across, up = new[0] - old[0], new[1] - old[1]
    middle = (old[0] + new[0]) / 2 + BEND * up, (old[1] + new[1]) / 2 - BEND * across
    shares = [n / pieces for n in range(pieces + 1)]
    x, y = ([(1 - t) ** 2 * old[i] + 2 * t * (1 - t) * middle[i] + t**2 * new[i] for t in shares] for i in (0, 1))
    return list(zip(x, y, strict=True))


def _name_points(
    panel: Axes, canvas: FigureCanvasAgg, drawn: Sequence[Point], axes: tuple[str, str], curves: Sequence[Curve]
) -> None:
    """Each model's name beside its point, clear of the others, joined to it by a line where it had to move away."""
    anchors = [_on_page(panel, *_spot(point, *axes)) for point in drawn]
    halo = [Stroke(linewidth=3, foreground="white"), Normal()]
    texts = [panel.text(0, 0, p.name, fontsize=9.5, color=INK, zorder=7, path_effects=halo) for p in drawn]
    extents = [text.get_window_extent(canvas.get_renderer()) for text in texts]
    boxes = place(
        anchors,
        [(float(extent.width) * 72 / DPI + 3, float(extent.height) * 72 / DPI) for extent in extents],
        inside=_frame(panel),
        marks=[_marks(panel, point, *axes) for point in drawn],
        curves=[curve(panel) for curve in curves],
    )
    to_data = panel.transData.inverted().transform
    for text, anchor, box in zip(texts, anchors, boxes, strict=True):
        x, y = to_data(((box[0] + 1.5) * DPI / 72, (box[1] + box[3]) / 2 * DPI / 72))
        text.set_position((float(x), float(y)))
        text.set_verticalalignment("center")
        if joined(anchor, end := nearest_edge(box, anchor)):
            line = to_data([[v * DPI / 72 for v in spot] for spot in (anchor, end)])
            panel.plot(line[:, 0], line[:, 1], color=FAINT, linewidth=0.7, zorder=3, scalex=False, scaley=False)


def _frame(panel: Axes) -> Box:
    left, bottom, right, top = (float(v) * 72 / DPI for v in panel.get_window_extent().extents)
    return left, bottom, right, top


def _on_page(panel: Axes, x: float, y: float) -> Spot:
    """The place of a value in points of the printed page."""
    across, up = panel.transData.transform((x, y)) * 72 / DPI
    return float(across), float(up)


def _marks(panel: Axes, point: Point, cost: str, quality: str) -> list[Box]:
    """The boxes on the page that a point and its error bars cover."""
    x, y = _spot(point, cost, quality)
    wide, tall = _bounds(point.measures[cost]), _bounds(point.measures[quality])
    (left, middle), (right, _) = _on_page(panel, wide[0], y), _on_page(panel, wide[-1], y)
    (centre, bottom), (_, top) = _on_page(panel, x, tall[0]), _on_page(panel, x, tall[-1])
    return [
        (centre - 5, middle - 5, centre + 5, middle + 5),
        (left - 1, middle - 3, right + 1, middle + 3),
        (centre - 3, bottom - 1, centre + 3, top + 1),
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
    """`path` as a PNG of the `terms` in a `metrics.jsonl` over the tokens seen; by default all that look like losses.

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
    families = list(dict.fromkeys(term.removeprefix("eval_") for term in curves))
    for term, curve in curves.items():
        colour = COLOURS[families.index(term.removeprefix("eval_")) % len(COLOURS)]
        _draw_curve(panel, term, curve, colour)
    panel.set_xlim(left=0)
    panel.set_xlabel(f"{over} seen", color=INK)
    panel.set_ylabel("nats per token, lower is better", color=INK)
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
    panel.legend(frameon=False, fontsize=9, labelcolor=INK, ncols=1 + len(curves) // 5)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI)


def _terms(entries: Sequence[Mapping[str, Any]], over: str) -> list[str]:
    """Every logged number that the trainer does not log for its own books, in order of appearance."""
    named = {name: None for entry in entries for name, value in entry.items() if isinstance(value, int | float)}
    books = ("_per_second", "_runtime", "_memory", "_flos")
    return [n for n in named if n not in BOOKS and n != over and not n.startswith("train_") and not n.endswith(books)]


def _curve(entries: Sequence[Mapping[str, Any]], term: str, over: str) -> list[tuple[float, float]]:
    pairs = ((entry[over], entry.get(term)) for entry in entries)
    return [(float(x), float(y)) for x, y in pairs if isinstance(y, int | float) and math.isfinite(y)]


def _draw_curve(panel: Axes, term: str, curve: Sequence[tuple[float, float]], colour: str) -> None:
    """What is measured now and then as points, what is logged all the time faintly with its moving mean."""
    x, y = zip(*curve, strict=True)
    label = term.replace("_", " ")
    if term.startswith("eval_") or len(curve) < 40:
        panel.plot(x, y, "o--" if term.startswith("eval_") else "o-", color=colour, ms=4, linewidth=1.2, label=label)
        return
    panel.plot(x, y, color=colour, alpha=0.25, linewidth=0.8)
    panel.plot(x, _smooth(y, reach=len(y) // 40), color=colour, linewidth=1.8, label=label)


def _smooth(values: Sequence[float], *, reach: int) -> list[float]:
    """The mean over up to `reach` values on either side; at the start no more after than before, so it falls too."""
    windows = (values[max(0, i - reach) : i + min(reach, i) + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def _short(value: float) -> str:
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g} {letter}"
    return f"{value:g}"
