"""The Pareto frontier of models, quality against cost, as data and as an HTML page.

A model is dominated if another is at least as good and at least as cheap, and better in one of the two. The others are
the Pareto frontier. `render_html` draws it as one HTML file that holds its numbers, styles and script.
"""

import html
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from potstill.core.errors import DataError
from potstill.core.measure import Measure
from potstill.core.measure_info import format_parameters
from potstill.core.measure_table import COSTS, MEASURES, QUALITIES

FIRST_QUALITIES = ("teacher_kl", "teacher_agreement")
TITLES = {name: info.title for name, info in MEASURES.items()}


@dataclass(frozen=True)
class Point:
    """A model on the chart: its measures by name, and the name of its parent model."""

    name: str
    measures: Mapping[str, Measure]
    parent: str | None = None

    def has_measures(self, *names: str) -> bool:
        """Whether this model has all of these measures."""
        return all(name in self.measures for name in names)


def build_points(cards: Iterable[Mapping[str, Any]]) -> list[Point]:
    """A point for each card `{"name": ..., "measures": [...], "parent": ...}`; measures may be dictionaries.

    Infinite and NaN measures, such as the perplexity of a broken model, are left out, since a chart cannot show them.

    Raises: DataError for a card without name or measures, and for two cards with one name.
    """
    points_by_name: dict[str, Point] = {}
    for card in cards:
        try:
            measures = [_parse_measure(entry) for entry in card["measures"]]
            point = Point(card["name"], {m.name: m for m in measures if math.isfinite(m.value)}, card.get("parent"))
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"a card needs name and measures ({error}), unlike {str(card)[:80]}") from error
        if point.name in points_by_name:
            raise DataError(f"two models have the name {point.name!r}; give each its own name")
        points_by_name[point.name] = point
    return list(points_by_name.values())


def _parse_measure(entry: Measure | Mapping[str, Any]) -> Measure:
    return entry if isinstance(entry, Measure) else Measure(**{**entry, "value": float(entry["value"])})


def find_dominated(points: Sequence[Point], cost: str, quality: str) -> list[bool]:
    """For each point, whether another is at least as good in both measures and better in one.

    A point without one of the measures is not dominated and does not dominate.
    """
    losses = [_get_losses(point, cost, quality) for point in points]
    return [a is not None and any(b is not None and _dominates(b, a) for b in losses) for a in losses]


def _get_losses(point: Point, *names: str) -> tuple[float, ...] | None:
    """The measures with such signs that lower is better; None if one is missing."""
    if not point.has_measures(*names):
        return None
    measures = (point.measures[name] for name in names)
    return tuple(-m.value if m.better == "higher" else m.value for m in measures)


def _dominates(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a != b and all(x <= y for x, y in zip(a, b, strict=True))


def filter_measured(points: Sequence[Point], names: Sequence[str]) -> list[str]:
    """The names of measures that at least one point has."""
    return [name for name in names if any(point.has_measures(name) for point in points)]


def get_axes(points: Sequence[Point]) -> tuple[list[str], list[str]]:
    """The (costs, qualities) that at least one point has.

    Raises: DataError if there is no cost or no quality.
    """
    costs, qualities = filter_measured(points, COSTS), filter_measured(points, QUALITIES)
    if not costs or not qualities:
        raise DataError(f"{len(points)} models have no quality or no cost measured; run `potstill measure` on them")
    return costs, qualities


def choose_quality(points: Sequence[Point], qualities: Sequence[str]) -> str:
    """The quality that a chart shows first: what distillation is for, where two models have it measured."""
    for name in FIRST_QUALITIES:
        if sum(point.has_measures(name) for point in points) >= 2:
            return name
    return qualities[0]


def is_logarithmic(name: str, values: Sequence[float]) -> bool:
    """Whether an axis is logarithmic: its values differ by more than a factor of two, and are no shares."""
    return bool(values) and min(values) > 0 and max(values) / min(values) > 2 and MEASURES[name].unit != "share"


def name_axis(name: str, values: Sequence[float]) -> str:
    """What stands at an axis, in two lines: the measure with its unit; which end is better, and the scale."""
    scale = ", log scale" if is_logarithmic(name, values) else ""
    return f"{TITLES[name]}\n{MEASURES[name].better} is better{scale}"


def to_display_unit(measure: Measure, value: float | None = None) -> float:
    """`value`, by default that of `measure`, in the unit of the chart."""
    value = measure.value if value is None else value
    return value / MEASURES[measure.name].scale if measure.name in MEASURES else value


def format_value(value: float, name: str) -> str:
    """`value`, given in the unit of the chart, as text with a suitable number of digits."""
    if name == "parameters":
        return format_parameters(value)
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.3f}" if value < 10 else f"{value:.1f}"


def to_chart_data(points: Sequence[Point]) -> dict[str, Any]:
    """The numbers of the chart as plain data for JSON."""
    costs, qualities = get_axes(points)
    models = [
        {"name": point.name, "parent": point.parent, "measures": [_to_display_dict(m) for m in point.measures.values()]}
        for point in points
    ]
    return {
        "costs": costs,
        "qualities": qualities,
        "quality": choose_quality(points, qualities),
        "titles": TITLES,
        "models": models,
    }


def _to_display_dict(measure: Measure) -> dict[str, Any]:
    bounds = {
        k: to_display_unit(measure, v) for k, v in (("low", measure.low), ("high", measure.high)) if v is not None
    }
    text = format_value(to_display_unit(measure), measure.name)
    return {**measure.to_dict(), "value": to_display_unit(measure), **bounds, "text": text}


def render_html(points: Sequence[Point], *, title: str = "Quality against cost") -> str:
    """An HTML page with the chart, a choice of axes, values on hover and a table, from `to_chart_data`.

    The page loads nothing, follows the reader's light or dark theme, and shows the table without scripts too.
    """
    template = files("potstill.evaluate.charts").joinpath("frontier.html").read_text(encoding="utf-8")
    data = json.dumps(to_chart_data(points), ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")
    for name, text in {"TITLE": html.escape(title), "TABLE": _render_table(points), "DATA": data}.items():
        template = template.replace(f"<!--{name}-->", text)
    return template


def _render_table(points: Sequence[Point]) -> str:
    costs, qualities = get_axes(points)
    columns = [*qualities, *costs]
    heads = "".join(f'<th scope="col">{html.escape(TITLES[name])}</th>' for name in columns)
    rows = "".join(
        f'<tr><th scope="row">{html.escape(point.name)}</th>'
        f"{''.join(_render_cell(point, name) for name in columns)}</tr>"
        for point in points
    )
    return f'<table><thead><tr><th scope="col">model</th>{heads}</tr></thead><tbody>{rows}</tbody></table>'


def _render_cell(point: Point, name: str) -> str:
    measure = point.measures.get(name)
    if measure is None:
        return "<td>–</td>"
    text = format_value(to_display_unit(measure), name)
    if measure.low is not None and measure.high is not None:
        low, high = (format_value(to_display_unit(measure, bound), name) for bound in (measure.low, measure.high))
        text += f"<small>{low} – {high}</small>"
    note = f' title="{html.escape(measure.note)}"' if measure.note else ""
    return f"<td{note}>{text}</td>"
