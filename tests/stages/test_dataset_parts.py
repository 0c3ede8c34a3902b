"""Finished parts are read back as they were written."""

from pathlib import Path

import pytest

from potstill.stages.dataset_parts import load_part


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\r", "\n", "\x1c"])
def test_a_sample_with_a_separator_of_lines_is_one_line_of_its_part(separator: str, tmp_path: Path) -> None:
    lines = [[[f"one{separator}two", True]], [["three", False]]]
    assert load_part(tmp_path / "part.jsonl", lambda: lines) == lines
    assert load_part(tmp_path / "part.jsonl", list) == lines
