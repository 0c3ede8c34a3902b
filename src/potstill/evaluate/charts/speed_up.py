"""Draws the speed-up of speculative decoding against the draft length, as an HTML page with a chart and a table.

A line shows what is predicted for the lengths of a draft, and a ring what is predicted for a tree. Dots are measured.
"""

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import cycle
from typing import Any

WIDTH, HEIGHT = 820, 420
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 16, 56  # margins
NUM_COLORS = 6  # of the template
COLUMNS = {  # field of a setting: heading and format
    "tokens_per_pass": ("tokens per pass", "{:.2f}"),
    "draft_cost": ("cost of the draft", "{:.2f}"),
    "verify_cost": ("cost of verification", "{:.2f}"),
    "predicted": ("predicted", "{:.2f}"),
    "measured": ("measured", "{:.2f}"),
    "error": ("error", "{:+.1%}"),
}

SettingRow = Mapping[str, Any]  # draft, draft_length, tree and the fields of COLUMNS, of which some may be None


@dataclass(frozen=True)
class Axes:
    """The places of lengths and speed-ups in the picture."""

    labels: Sequence[str]
    top: float

    def x(self, label: str) -> float:
        """The middle of the column of a length or tree."""
        step = (WIDTH - LEFT - RIGHT) / len(self.labels)
        return LEFT + step * (self.labels.index(label) + 0.5)

    def y(self, speed_up: float) -> float:
        """The height of a speed-up."""
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * speed_up / self.top


def render_html(settings: Sequence[SettingRow], *, title: str, advice: str) -> str:
    """An HTML page that loads nothing and follows the reader's light or dark theme."""
    template = files("potstill.evaluate.charts").joinpath("speed_up.html").read_text(encoding="utf-8")
    colors = dict(zip(dict.fromkeys(row["draft"] for row in settings), cycle(range(NUM_COLORS)), strict=False))
    legend = "".join(f'<li class="c{color}">{html.escape(draft)}</li>' for draft, color in colors.items())
    parts = {
        "TITLE": html.escape(title),
        "ADVICE": html.escape(advice),
        "LEGEND": legend,
        "CHART": draw_chart(settings, colors),
        "TABLE": render_table(settings),
    }
    for name, text in parts.items():
        template = template.replace(f"<!--{name}-->", text)
    return template


def get_label(row: SettingRow) -> str:
    """The length of a draft, or its tree."""
    return f"tree {row['tree']}" if row["tree"] else str(row["draft_length"])


def draw_chart(settings: Sequence[SettingRow], colors: Mapping[str, int]) -> str:
    """The chart as an SVG element; `colors` are those of the drafts."""
    lengths = sorted({row["draft_length"] for row in settings if not row["tree"]})
    trees = dict.fromkeys(get_label(row) for row in settings if row["tree"])
    values = [row[name] for row in settings for name in ("predicted", "measured") if row[name] is not None]
    axes = Axes([*map(str, lengths), *trees], max(1.2, 1.08 * max(values)))
    parts = draw_axes(axes)
    for draft, color in colors.items():
        rows = [row for row in settings if row["draft"] == draft]
        chains = sorted((row for row in rows if not row["tree"]), key=lambda row: row["draft_length"])
        points = " ".join(f"{axes.x(get_label(row)):.1f},{axes.y(row['predicted']):.1f}" for row in chains)
        parts.append(f'<g class="c{color}"><polyline class="predicted" points="{points}"/>')
        parts += [draw_mark(axes, row, "predicted", "alone") for row in rows if row["tree"] or len(chains) == 1]
        parts += [draw_mark(axes, row, "measured", "measured") for row in rows if row["measured"] is not None]
        parts.append("</g>")
    label = "Speed-up against draft length; the same numbers are in the table below"
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>'


def draw_axes(axes: Axes) -> list[str]:
    """Grid lines with their speed-ups, the line of plain decoding, and the lengths."""
    parts = []
    step = choose_step(axes.top)
    for n in range(math.floor(axes.top / step) + 1):
        y = axes.y(n * step)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 10}" y="{y + 5:.1f}" text-anchor="end">{n * step:g}</text>')
    y = axes.y(1.0)
    parts.append(f'<line class="even" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
    for label in axes.labels:
        x = axes.x(label)
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 22}" text-anchor="middle">{html.escape(label)}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text class="axis" x="{middle}" y="{HEIGHT - 8}" text-anchor="middle">tokens per draft</text>')
    height = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(
        f'<text class="axis" transform="translate(16 {height}) rotate(-90)" text-anchor="middle">'
        "speed, plain decoding = 1</text>"
    )
    return parts


def choose_step(top: float) -> float:
    """The distance of grid lines: 1, 2 or 5 times a power of ten, with at most eight lines."""
    unit = 10.0 ** math.floor(math.log10(top / 8))
    return next(unit * k for k in (1, 2, 5, 10) if top / (unit * k) <= 8)


def draw_mark(axes: Axes, row: SettingRow, field: str, kind: str) -> str:
    """A dot or ring at a speed-up, with its numbers on hover."""
    name = f"{row['draft']}, {get_label(row)}: {row[field]:.2f} {field}"
    return (
        f'<circle class="{kind}" cx="{axes.x(get_label(row)):.1f}" cy="{axes.y(row[field]):.1f}" r="5">'
        f"<title>{html.escape(name)}</title></circle>"
    )


def render_table(settings: Sequence[SettingRow]) -> str:
    """The numbers of all settings."""
    heads = "".join(f'<th scope="col">{heading}</th>' for heading, _ in COLUMNS.values())
    rows = "".join(
        f'<tr><th scope="row">{html.escape(row["draft"])}, {html.escape(get_label(row))}</th>'
        + "".join(
            f"<td>{'–' if row[name] is None else spelling.format(row[name])}</td>"
            for name, (_, spelling) in COLUMNS.items()
        )
        + "</tr>"
        for row in settings
    )
    return f'<table><thead><tr><th scope="col">draft</th>{heads}</tr></thead><tbody>{rows}</tbody></table>'
