import itertools
import json
import re
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from potstill.core.errors import DataError
from potstill.core.measure import Measure
from potstill.evaluate.charts.frontier import (
    Point,
    build_points,
    find_dominated,
    format_value,
    get_axes,
    render_html,
    to_chart_data,
)

SIZES = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), max_size=6)


def point(name, size, bits, speed=None, parent=None):
    measures = [
        Measure("parameters", float(size), "parameters", 1),
        Measure("bits_per_byte", float(bits), "bits/byte", 9, low=bits - 0.1, high=bits + 0.1),
    ]
    if speed is not None:
        measures.append(Measure("decode_tokens_per_second", float(speed), "tokens/s", 5, "higher"))
    return Point(name, {m.name: m for m in measures}, parent)


CHART = [point("teacher", 135e6, 1.1, 30.0), point("small <b>&", 1e8, 1.3, 41.0, "teacher"), point("bad", 1.1e8, 2.5)]


@given(SIZES)
def test_dominated_is_what_trying_every_pair_says(pairs):
    found = find_dominated([point(str(n), *pair) for n, pair in enumerate(pairs)], "parameters", "bits_per_byte")
    for n, (cost, loss) in enumerate(pairs):
        beaten = any(c <= cost and q <= loss and (c, q) != (cost, loss) for c, q in pairs)
        assert found[n] == beaten


@given(SIZES)
def test_what_is_not_dominated_never_dominates_one_another(pairs):
    chart = [point(str(n), *pair) for n, pair in enumerate(pairs)]
    best = [
        p for p, beaten in zip(pairs, find_dominated(chart, "parameters", "bits_per_byte"), strict=True) if not beaten
    ]
    for a, b in itertools.permutations(set(best), 2):
        assert (a[0] < b[0]) == (a[1] > b[1])
    assert bool(best) == bool(pairs)


def test_where_more_is_better_more_dominates():
    chart = [point("slow", 1, 1.0, speed=10), point("fast", 1, 1.0, speed=20)]
    assert find_dominated(chart, "decode_tokens_per_second", "bits_per_byte") == [True, False]


def test_a_point_without_the_measure_neither_dominates_nor_is_dominated():
    chart = [point("unmeasured", 1, 0.5), point("measured", 1, 1.0, speed=20)]
    assert find_dominated(chart, "decode_tokens_per_second", "bits_per_byte") == [False, False]


def test_points_come_from_cards_as_json_or_measures():
    plain = {"name": "a", "measures": [CHART[0].measures["parameters"].to_dict()], "parent": "b"}
    live = {"name": "c", "measures": list(CHART[1].measures.values())}
    a, c = build_points([plain, live])
    assert (a.name, a.parent, a.measures["parameters"].value) == ("a", "b", 135e6)
    assert c.measures == CHART[1].measures


def test_measures_that_are_not_finite_are_left_out():
    broken = {"name": "a", "measures": [Measure("perplexity", float("inf"), "1", 3)]}
    assert build_points([broken])[0].measures == {}


@pytest.mark.parametrize("card", [{"measures": []}, {"name": "a"}, {"name": "a", "measures": [{"nome": 1}]}])
def test_a_card_without_name_or_measures_is_refused(card):
    with pytest.raises(DataError, match="needs name and measures"):
        build_points([card])


def test_two_models_of_one_name_are_refused():
    with pytest.raises(DataError, match="two models have the name 'a'"):
        build_points([{"name": "a", "measures": []}] * 2)


def test_nothing_measured_is_refused():
    with pytest.raises(DataError, match="0 models"):
        get_axes([])
    with pytest.raises(DataError, match="1 models have no quality"):
        render_html([Point("a", {"parameters": Measure("parameters", 1.0, "parameters", 1)})])


class Reader(HTMLParser):
    """Collects tags with their attributes, the text of scripts, and the cells of the table."""

    def __init__(self) -> None:
        super().__init__()
        self.tags, self.scripts, self.cells, self._inside = [], [], [], ""

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._inside = tag
        if tag == "script":
            self.scripts.append("")
        if tag in ("th", "td"):
            self.cells.append("")

    def handle_data(self, data):
        if self._inside == "script":
            self.scripts[-1] += data
        elif self._inside in ("th", "td"):
            self.cells[-1] += data

    def handle_endtag(self, tag):
        self._inside = ""


@pytest.fixture
def read():
    reader = Reader()
    reader.feed(render_html(CHART, title="Cost & <quality>"))
    return reader


def test_the_page_loads_nothing(read):
    text = render_html(CHART)
    assert not [a for _, a in read.tags if {"src", "href", "data", "action", "srcset", "poster"} & set(a)]
    assert not [tag for tag, _ in read.tags if tag in {"link", "iframe", "img", "object", "base"}]
    assert not re.search(r"@import|url\(|fetch\(|XMLHttpRequest|WebSocket|import\(", text.replace("url(#head)", ""))
    assert re.findall(r"https?://[^\"'\s]*", text) == ["http://www.w3.org/2000/svg"]  # a namespace, not an address


def test_the_numbers_of_the_page_are_in_it_as_json(read):
    data = json.loads(read.scripts[0])
    assert data == json.loads(json.dumps(to_chart_data(CHART)))
    assert [model["name"] for model in data["models"]] == ["teacher", "small <b>&", "bad"]
    assert data["costs"] == ["parameters", "decode_tokens_per_second"]
    assert data["qualities"] == ["bits_per_byte"]
    measure = data["models"][0]["measures"][1]
    assert (measure["value"], measure["low"], measure["text"]) == (1.1, 1.0, "1.100")


def test_names_cannot_break_out_of_the_page(read):
    evil = render_html([point("</script><script>alert(1)</script><!--TABLE-->", 1, 1.0)], title="</title><script>")
    assert evil.count("<script") == render_html(CHART).count("<script") == 2
    assert "small <b>&" in read.cells
    assert not [tag for tag, _ in read.tags if tag == "b"]


def test_the_table_beneath_holds_every_model_and_measure(read):
    assert read.cells[:4] == ["model", "bits per byte", "parameters", "decode (tokens/s)"]
    assert [cell for cell in read.cells if cell.startswith("135.0")] == ["135.0M"]
    assert read.cells.count("–") == 1


def test_bytes_are_shown_in_mebibytes():
    chart = [
        Point("a", {m.name: m for m in (CHART[0].measures["bits_per_byte"], Measure("bytes", 3.0 * (1 << 20), "B", 1))})
    ]
    (model,) = to_chart_data(chart)["models"]
    assert [m["value"] for m in model["measures"] if m["name"] == "bytes"] == [3]


@pytest.mark.parametrize(
    ("value", "name", "text"),
    [
        (1.5e9, "parameters", "1.50B"),
        (134515008.0, "parameters", "134.5M"),
        (1234.0, "parameters", "1,234"),
        (1.23456, "bits_per_byte", "1.235"),
        (41.26, "decode_tokens_per_second", "41.3"),
        (12345.6, "prefill_tokens_per_second", "12,346"),
    ],
)
def test_numbers_are_written_short(value, name, text):
    assert format_value(value, name) == text
