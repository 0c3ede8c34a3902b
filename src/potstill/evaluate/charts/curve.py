"""Draws the losses of a training run as a PNG file."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from potstill.core.errors import DataError
from potstill.core.metrics_log import is_loss, read_metrics
from potstill.evaluate.charts.style import COLORS, DPI, INK, TEXT, add_title, style_panel

TOTAL, HELD_OUT = "loss", "eval_"  # the name of the total loss, and the prefix of held-out values
LOG_RATIO = 10.0


def draw_curve(metrics: Path, path: Path, *, terms: Sequence[str] = (), x_key: str = "tokens", title: str = "") -> None:
    """Write `path`, a PNG of `terms` of a `metrics.jsonl` over the tokens seen; by default of all losses.

    The total loss is the dark line. Held-out values are dots in the color of their term. The scale is logarithmic where
    the values differ by more than a factor of ten.

    Raises: DataError if there is nothing to draw.
    """
    entries = [entry for entry in read_metrics(metrics) if x_key in entry]
    curves = {term: _extract_curve(entries, term, x_key) for term in terms or _find_terms(entries, x_key)}
    curves = {term: curve for term, curve in curves.items() if curve}
    if not curves:
        raise DataError(f"{metrics} has no {' or '.join(terms) or 'term'} over {x_key} to draw")
    figure = Figure(figsize=(6.8, 4.4), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    panel = figure.subplots()
    style_panel(panel)
    add_title(figure, title)
    for term, curve in curves.items():
        _draw_term(panel, term, curve, _choose_color(term, list(curves)))
    panel.set_xlim(left=0)
    values = [y for curve in curves.values() for _, y in curve]
    is_log = min(values) > 0 and max(values) / min(values) > LOG_RATIO
    if is_log:
        panel.set_yscale("log")
        panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        panel.yaxis.set_minor_formatter(NullFormatter())
    panel.set_xlabel(f"{x_key} seen", color=INK, fontsize=TEXT)
    panel.set_ylabel(f"loss, lower is better{', log scale' if is_log else ''}", color=INK, fontsize=TEXT)
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _format_short(value)))
    panel.legend(frameon=False, fontsize=TEXT, labelcolor=INK, ncols=1 + len(curves) // 5)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI)


def _find_terms(entries: Sequence[Mapping[str, Any]], x_key: str) -> list[str]:
    """Every logged number except bookkeeping such as the learning rate, in order of appearance."""
    numeric_names = {name: None for entry in entries for name, value in entry.items() if isinstance(value, int | float)}
    return [name for name in numeric_names if name != x_key and is_loss(name)]


def _extract_curve(entries: Sequence[Mapping[str, Any]], term: str, x_key: str) -> list[tuple[float, float]]:
    pairs = ((entry[x_key], entry.get(term)) for entry in entries)
    return [(float(x), float(y)) for x, y in pairs if isinstance(y, int | float) and math.isfinite(y)]


def _choose_color(term: str, terms: Sequence[str]) -> str:
    """Ink for the total loss; each other term and its held-out values have a color of their own."""
    families = dict.fromkeys(name.removeprefix(HELD_OUT) for name in terms)
    family = term.removeprefix(HELD_OUT)
    if family == TOTAL and len(families) > 1:
        return INK
    return COLORS[[name for name in families if name != TOTAL or len(families) == 1].index(family) % len(COLORS)]


def _draw_term(panel: Axes, term: str, curve: Sequence[tuple[float, float]], color: str) -> None:
    """Draw a term: held-out values as large dots, few values as points, many faintly with their moving mean."""
    x, y = zip(*curve, strict=True)
    family = term.removeprefix(HELD_OUT)
    label = "total loss" if family == TOTAL else family.replace("_", " ")
    if term.startswith(HELD_OUT):
        style: dict[str, Any] = {"ms": 7, "linewidth": 1.4, "markeredgecolor": "white", "zorder": 4}
        panel.plot(x, y, "o--", color=color, label=f"{label}, held out", **style)
    elif len(curve) < 40:
        panel.plot(x, y, "o-", color=color, ms=4, linewidth=1.4, label=label)
    else:
        panel.plot(x, y, color=color, alpha=0.25, linewidth=0.8)
        panel.plot(x, _smooth_values(y, radius=len(y) // 40), color=color, linewidth=2.2, label=label)


def _smooth_values(values: Sequence[float], *, radius: int) -> list[float]:
    """The moving mean over up to `radius` values on each side, symmetric at the start, so as not to lag."""
    windows = (values[max(0, i - radius) : i + min(radius, i) + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def _format_short(value: float) -> str:
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"
