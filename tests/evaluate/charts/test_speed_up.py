"""The chart of speed-ups."""

import re
from html.parser import HTMLParser
from typing import Any

import pytest

from potstill.evaluate.charts.speed_up import COLUMNS, HEIGHT, choose_step, render_html


def row(draft: str, length: int | None, predicted: float, measured: float | None, tree: str | None = None) -> Any:
    values = dict.fromkeys(COLUMNS, 1.0)
    error = None if measured is None else predicted / measured - 1
    shape = {"draft": draft, "draft_length": length, "tree": tree}
    return {**values, **shape, "predicted": predicted, "measured": measured, "error": error}


ROWS = [
    row("lookup", 1, 1.05, 1.04),
    row("lookup", 4, 1.5, 1.4),
    row("a <b>", 1, 0.8, None),
    row("a <b>", 4, 0.5, None),
    row("a <b>", None, 0.6, 0.61, tree="4,2"),
]


def points(page: str, kind: str) -> list[float]:
    """The heights of marks, as shares of the picture."""
    return [float(y) / HEIGHT for y in re.findall(rf'class="{kind}" cx="[\d.]+" cy="([\d.]+)"', page)]


def test_lines_are_predictions_and_dots_measurements() -> None:
    page = render_html(ROWS, title="of <i>", advice="Speculate & win.")
    assert len(re.findall(r"<polyline", page)) == 2
    measured = points(page, "measured")
    assert len(measured) == 3
    assert len(points(page, "alone")) == 1
    assert measured[1] < measured[0] < measured[2]  # a higher speed is nearer to the top
    (even,) = re.findall(r'class="even"[^>]* y1="([\d.]+)"', page)
    assert measured[0] < float(even) / HEIGHT < measured[2]
    assert "a &lt;b&gt;" in page
    assert "<b>" not in page
    assert "Speculate &amp; win." in page
    assert "tree 4,2" in page
    assert "http" not in page.replace("http://www.w3.org", "")


def test_the_page_is_whole_and_its_table_has_every_setting() -> None:
    page = render_html(ROWS, title="t", advice="a")
    assert "<!--" not in page
    cells = re.findall(r"<td>(.*?)</td>", page)
    assert len(cells) == len(ROWS) * len(COLUMNS)
    assert "–" in cells
    parser = HTMLParser()
    parser.feed(page)
    parser.close()


@pytest.mark.parametrize(("top", "step"), [(1.2, 0.2), (0.9, 0.2), (3.0, 0.5), (8.0, 1.0), (30.0, 5.0)])
def test_grid_lines_are_round_numbers(top: float, step: float) -> None:
    assert choose_step(top) == pytest.approx(step)
