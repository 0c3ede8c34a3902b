"""The metrics of a run are read back as they were written, up to a line that a crash cut short."""

from pathlib import Path

import pytest

from potstill.core.errors import DataError
from potstill.core.metrics_log import append_metrics, read_metrics, write_metrics


def test_half_a_last_line_is_left_out(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    assert read_metrics(file) == []
    entries = [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25}]
    write_metrics(file, entries[:1])
    append_metrics(file, entries[1])
    with file.open("a", encoding="utf-8") as stream:
        stream.write('{"step": 3, "lo')
    assert read_metrics(file) == entries


def test_a_metric_whose_name_has_a_separator_of_lines_is_read_back(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    entries = [{"step": 1, "reward\u2028mean": 0.5}, {"step": 2}]
    write_metrics(file, entries)
    assert read_metrics(file) == entries


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        pytest.param('{"step"\n{}\n', "line 1 is not JSON", id="half a first line"),
        pytest.param("{}\n3\n", "line 2 is not a JSON object: '3'", id="a number"),
    ],
)
def test_a_line_before_the_last_that_is_no_object_is_refused(tmp_path: Path, text: str, fault: str) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=fault):
        read_metrics(file)
